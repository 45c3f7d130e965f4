"""Checks of everything that differs on a GPU, and of the time and memory that it takes there: `make gpu-check`."""
