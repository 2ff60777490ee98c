"""cuDNN's fused attention, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from difax.core.contracts import BlockList, BlockScales, Scales, Segments
from difax.core.target import target

DTYPES = ("bfloat16", "float16")


def cudnn(rounded_lse: bool = False) -> Callable[..., Any]:
    """Exact attention by cuDNN's fused kernel, on NVIDIA GPUs, in bfloat16 or float16.

    The platform is the one that is compiled for (`difax.core.target`). jax itself declines head widths above 128 (256
    from Hopper on) or not divisible by 8.

    Args:
      rounded_lse: take the log-sum-exp as jax hands it out, rounded to the dtype of q (False: decline it). In
        bfloat16 a log-sum-exp of 8 is off by up to 0.03, and so are weights that are merged with it.

    Returns:
      The function; it declines other platforms and dtypes, segments (ids are known at run time only, and jax would
      make a bias [T, S] of them), block lists, scales, and the log-sum-exp unless `rounded_lse`.

    References: jax.nn.dot_product_attention(implementation="cudnn"); Dao 2023, FlashAttention-2, arXiv:2307.08691.
    """

    def attend(
        q_BTHK: jax.Array,
        k_BSHK: jax.Array,
        v_BSHK: jax.Array,
        segments: Segments | None = None,
        blocks: BlockList | None = None,
        scales: Scales | BlockScales | None = None,
        with_lse: bool = False,
    ) -> Any:
        for given, what in ((segments, "segments"), (blocks, "a list of blocks"), (scales, "scales")):
            if given is not None:
                raise NotImplementedError(what)
        dtypes = {str(a.dtype) for a in (q_BTHK, k_BSHK, v_BSHK)}
        if len(dtypes) > 1 or dtypes.isdisjoint(DTYPES):
            raise NotImplementedError(f"{' and '.join(sorted(dtypes))}; it computes in one of {', '.join(DTYPES)}")
        if with_lse and not rounded_lse:
            raise NotImplementedError("a log-sum-exp that is not rounded to the dtype of q (rounded_lse)")
        if target().platform != "gpu":
            raise NotImplementedError(f"the platform {target().platform}; it needs an NVIDIA GPU")
        try:
            out = jax.nn.dot_product_attention(q_BTHK, k_BSHK, v_BSHK, implementation="cudnn", return_residual=with_lse)
        except RuntimeError as error:  # what jax says where the library is missing
            raise NotImplementedError(f"this installation: {error}") from None
        if not with_lse:
            return out
        o_BTHK, lse_BTH = out
        return o_BTHK, jnp.swapaxes(lse_BTH, 1, 2).astype(jnp.float32)

    return attend
