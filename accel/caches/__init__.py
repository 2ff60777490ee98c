"""Feature caches: what is filled instead of computed. `planned`, `gate` and `fill` are the axes, the rest systems."""

from difax.accel.caches.ab_cache import ab_cache
from difax.accel.caches.adacache import adacache
from difax.accel.caches.attention_map import attention_map
from difax.accel.caches.autodiffusion import autodiffusion
from difax.accel.caches.bacache import bacache
from difax.accel.caches.block_caching import block_caching
from difax.accel.caches.dbcache import dbcache, fbcache
from difax.accel.caches.dbprune import dbprune
from difax.accel.caches.delta_dit import delta_dit
from difax.accel.caches.duca import duca
from difax.accel.caches.duodiff import duodiff
from difax.accel.caches.experts import experts
from difax.accel.caches.fastcache import fastcache
from difax.accel.caches.fastercache import fastercache
from difax.accel.caches.fora import fora, fora_dit
from difax.accel.caches.frdiff import frdiff
from difax.accel.caches.icc import icc
from difax.accel.caches.lazydit import lazydit
from difax.accel.caches.magcache import magcache
from difax.accel.caches.pab import pab
from difax.accel.caches.routers import harmonica, learning_to_cache
from difax.accel.caches.scheduled import scheduled
from difax.accel.caches.skipcache import skipcache
from difax.accel.caches.smoothcache import smoothcache
from difax.accel.caches.taylorseer import taylorseer, taylorseer_diffusers
from difax.accel.caches.teacache import teacache
from difax.accel.caches.tgate import tgate
from difax.accel.caches.toca import toca
from difax.accel.caches.tokencache import tokencache

CACHES = {
    "fora": fora,
    "taylorseer": taylorseer,
    "taylorseer_diffusers": taylorseer_diffusers,
    "teacache": teacache,
    "fbcache": fbcache,
    "dbcache": dbcache,
    "dbprune": dbprune,
    "fora_dit": fora_dit,
    "scheduled": scheduled,
    "smoothcache": smoothcache,
    "learning_to_cache": learning_to_cache,
    "harmonica": harmonica,
    "pab": pab,
    "delta_dit": delta_dit,
    "magcache": magcache,
    "ab_cache": ab_cache,
    "frdiff": frdiff,
    "block_caching": block_caching,
    "bacache": bacache,
    "attention_map": attention_map,
    "toca": toca,
    "duca": duca,
    "tokencache": tokencache,
    "icc": icc,
    "skipcache": skipcache,
    "adacache": adacache,
    "lazydit": lazydit,
    "fastcache": fastcache,
    "tgate": tgate,
    "fastercache": fastercache,
    "autodiffusion": autodiffusion,
}

# accelerators that are no caches: they run another network and remember nothing
NETWORKS = {"duodiff": duodiff, "experts": experts}
