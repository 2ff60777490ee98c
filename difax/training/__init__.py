"""Data sets, losses and the training loop. Imports core, weights and media."""
