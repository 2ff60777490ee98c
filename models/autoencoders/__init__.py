"""Autoencoders, one file each. Import as `difax.models.autoencoders`."""

if __name__ != "difax.models.autoencoders":
    raise ImportError(f"import difax.models.autoencoders, not {__name__}: one identity per module")

from difax.models.autoencoders.wan import wan_autoencoder
from difax.models.autoencoders.wan_checkpoint import find_wan_autoencoder

__all__ = ["find_wan_autoencoder", "wan_autoencoder"]
