"""Modal: the launcher, the worker, and the table of GPUs."""
