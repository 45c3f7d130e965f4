"""Read settings from the environment, .env and recipes."""
