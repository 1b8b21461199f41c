"""The one training loop: losses, optimiser, checkpoints, metrics."""
