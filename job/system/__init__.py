"""The machine: device, paths, logging."""
