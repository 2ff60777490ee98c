"""Feature caches: what is filled instead of computed. `planned`, `gate` and `fill` are the axes, the rest systems."""

from difax.accel.caches.dbcache import dbcache, fbcache
from difax.accel.caches.dbprune import dbprune
from difax.accel.caches.fora import fora
from difax.accel.caches.taylorseer import taylorseer, taylorseer_diffusers
from difax.accel.caches.teacache import teacache

CACHES = {
    "fora": fora,
    "taylorseer": taylorseer,
    "taylorseer_diffusers": taylorseer_diffusers,
    "teacache": teacache,
    "fbcache": fbcache,
    "dbcache": dbcache,
    "dbprune": dbprune,
}
