"""Kernels for one kind of device each, one file a lowering; what chooses among them imports the one that it takes."""
