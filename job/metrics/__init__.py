"""Scores, their intervals, and baselines."""
