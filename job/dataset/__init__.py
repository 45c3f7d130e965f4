"""Read, clean, split and tokenize a data set."""
