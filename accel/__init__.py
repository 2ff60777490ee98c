"""Acceleration techniques, one folder per seam. Import as `difax.accel`."""

if __name__ != "difax.accel":
    raise ImportError(f"import difax.accel, not {__name__}: one identity per module")
