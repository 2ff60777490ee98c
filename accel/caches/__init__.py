"""Feature caches: what is filled instead of computed, one file each."""

from difax.accel.caches.fora import fora

CACHES = {"fora": fora}
