"""Checks whether a machine, or the nodes of an allocation, can train."""
