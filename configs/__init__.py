"""Experiment configurations: one `get_config(arg)` a file. Import as `difax.configs`."""

if __name__ != "difax.configs":
    raise ImportError(f"import difax.configs, not {__name__}: one identity per module")
