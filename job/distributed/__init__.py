"""Several processes: launch them, and exchange messages and tensors between them."""
