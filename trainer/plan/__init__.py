"""Compile the training step for a TPU slice that need not be there."""
