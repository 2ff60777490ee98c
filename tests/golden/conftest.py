"""Scripts that need torch are not collected as doctests."""

collect_ignore_glob = ["make_*.py"]
