"""Modal: the caller, the worker, and the GPUs there are."""
