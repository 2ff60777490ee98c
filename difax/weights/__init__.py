"""Checkpoints of others and our own: read, recognised, converted; and conditions that come as files. Imports core."""
