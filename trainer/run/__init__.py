"""The course of a run: what happens, in what order."""
