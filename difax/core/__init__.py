"""The sampling program: contracts, processes, the loop, the block runner, and what is counted of them.

Imports jax, flax and numpy, and no other room.
"""
