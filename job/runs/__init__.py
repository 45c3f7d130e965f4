"""A run on disk: its folder, atomic files, shutdown, report parts."""
