"""A run on disk: its folder, atomic writes, checksums, shutdown, and the parts of its report."""
