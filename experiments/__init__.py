"""Studies that use only the public API of difax; run as `python -m experiments.NAME`."""
