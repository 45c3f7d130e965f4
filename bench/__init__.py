"""Measurements of speed, memory and quality. They are not part of the installed package."""
