"""Modal and Hugging Face Jobs: launchers and workers, and the table of GPUs."""
