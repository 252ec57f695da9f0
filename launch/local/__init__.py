"""Ranks on this machine: of a command, elastic ones, of a Python function."""
