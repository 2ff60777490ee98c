"""What `experiments.peers` compares: networks of three kinds in two sizes, and the caches that both sides have."""

from __future__ import annotations

from typing import Any, NamedTuple


def _flux(double: int, single: int, heads: int, head_width: int, axes: Any, size: Any, text: Any) -> dict[str, Any]:
    tokens, width, pooled = text
    return {
        "kind": "flux",
        "class": "FluxTransformer2DModel",
        "arguments": {
            "in_channels": 64 if width > 64 else 16,
            "num_layers": double,
            "num_single_layers": single,
            "attention_head_dim": head_width,
            "num_attention_heads": heads,
            "joint_attention_dim": width,
            "pooled_projection_dim": pooled,
            "guidance_embeds": True,
            "axes_dims_rope": axes,
        },
        "size": size,
        "text_tokens": tokens,
        "batch": 1,
        "depth": double + single,
        "guide": "none",
    }


def _dit(depth: int, heads: int, head_width: int, size: int, batch: int) -> dict[str, Any]:
    return {
        "kind": "dit",
        "class": "DiTTransformer2DModel",
        "arguments": {
            "num_attention_heads": heads,
            "attention_head_dim": head_width,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": depth,
            "sample_size": size,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
            "norm_elementwise_affine": False,
        },
        "batch": batch,
        "depth": depth,
        "guide": "together",
    }


def _wan(depth: int, heads: int, head_width: int, ffn: int, channels: int, size: Any, text: Any) -> dict[str, Any]:
    return {
        "kind": "wan",
        "class": "WanTransformer3DModel",
        "arguments": {
            "patch_size": [1, 2, 2],
            "num_attention_heads": heads,
            "attention_head_dim": head_width,
            "in_channels": channels,
            "out_channels": channels,
            "text_dim": text[1],
            "freq_dim": 256,
            "ffn_dim": ffn,
            "num_layers": depth,
        },
        "size": size,
        "text_tokens": text[0],
        "batch": 1,
        "depth": depth,
        "guide": "separate",
    }


# name -> what `experiments.torch_caches` builds; FLUX has an embedded guidance and is sampled without another
# the tiny ones are faster for torch in one thread
THREADS = {"tiny": 1, "mid": 2}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "flux tiny": _flux(2, 4, 2, 12, (4, 4, 4), (8, 12), (5, 12, 6)),
    "dit tiny": _dit(6, 4, 8, 8, 2),
    "wan tiny": _wan(6, 2, 12, 48, 4, (3, 6, 8), (5, 24)),
    "flux mid": _flux(4, 8, 8, 128, (16, 56, 56), (16, 24), (32, 256, 128)),
    "dit mid": _dit(12, 12, 64, 32, 1),
    "wan mid": _wan(12, 6, 128, 3072, 16, (3, 16, 16), (32, 256)),
}


class Method(NamedTuple):
    """One cache on both sides; `threshold`: the peer's name for it where it is laid between the metrics."""

    library: str
    config: str
    settings: dict[str, Any]
    cache: str | None
    own: dict[str, Any]
    threshold: str | None = None
    guide: str | None = None  # where it is not the geometry's
    calibrator: dict[str, Any] | None = None


UNCACHED = Method("none", "", {}, None, {})


def methods(kind: str, depth: int, steps: int) -> dict[str, Method]:
    """Every method that both sides have for a network of so many blocks and a run of so many steps."""
    limit = "residual_diff_threshold"

    def dbcache(first: int, last: int, warmup: int, calibrator: Any = None, mask: Any = None, **caps: int) -> Method:
        names = {"max_continuous": "max_continuous_cached_steps", "max_cached": "max_cached_steps"}
        theirs = {"Fn_compute_blocks": first, "Bn_compute_blocks": last, "max_warmup_steps": warmup}
        theirs |= {names[k]: v for k, v in caps.items()}
        ours = {"first": first, "last": last, "warmup": warmup, **caps}
        if mask is not None:
            theirs |= {"steps_computation_mask": mask, "steps_computation_policy": "static", limit: 0.1}
            ours |= {"mask": mask, "policy": "static", "threshold": 0.1}
        if calibrator is not None:
            ours |= {"forecast": "taylor", "order": calibrator["taylorseer_order"]}
        free = None if mask is not None else limit
        return Method("cache-dit", "DBCacheConfig", theirs, "dbcache", ours, free, calibrator=calibrator)

    mask = [1, 1, 1, *([0, 0, 1] * steps)][: steps - 1] + [1]
    ratios = [1.0] + [0.985] * (steps - 1)
    branches = {
        "flux": [r"transformer_blocks\.\d+\.(attn|ff|ff_context)", r"single_transformer_blocks\.\d+\.proj_out"],
        "dit": [r"transformer_blocks\.\d+\.(attn1|ff)"],
        "wan": [r"blocks\.\d+\.(attn1|attn2|ffn)"],
    }[kind]
    # what feeds a FLUX single block's last product is given out as zeros
    inactive = [r"single_transformer_blocks\.\d+\.(attn|proj_mlp)"] if kind == "flux" else None
    window = (100.0, 850.0)
    pab = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": window}
    ranges = {"attn": 2}
    if kind == "wan":
        pab |= {"cross_attention_block_skip_range": 3, "cross_attention_timestep_skip_range": window}
        ranges["cross"] = 3
    if kind == "flux":  # a single block's attention cannot be held without its MLP here
        pab["spatial_attention_block_identifiers"] = ("^transformer_blocks",)
    found = {
        "cache-dit F1B0": dbcache(1, 0, 2),
        "cache-dit F1B1 MC2": dbcache(1, 1, 3, max_continuous=2),
        "cache-dit half B0": dbcache(depth // 2, 0, 4, max_cached=4),
        "cache-dit F1B0 Taylor": dbcache(1, 0, 4, {"taylorseer_order": 1}, max_continuous=3),
        "cache-dit SCM static": dbcache(1, 0, 8, mask=mask),
        "cache-dit DBPrune": Method(
            "cache-dit",
            "DBPruneConfig",
            {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 2},
            "dbprune",
            {"first": 1, "last": 0, "warmup": 2},
            limit,
        ),
        "diffusers FirstBlockCache": Method("diffusers", "FirstBlockCacheConfig", {}, "fbcache", {}, "threshold"),
        "diffusers MagCache": Method(
            "diffusers",
            "MagCacheConfig",
            {"mag_ratios": ratios, "threshold": 0.06, "max_skip_steps": 3, "retention_ratio": 0.2},
            "magcache",
            {"ratios": ratios, "threshold": 0.06, "streak": 3, "retention": 0.2},
        ),
        "diffusers TaylorSeer": Method(
            "diffusers",
            "TaylorSeerCacheConfig",
            {
                "cache_interval": 4,
                "max_order": 1,
                "disable_cache_before_step": 3,
                "taylor_factors_dtype": "float32",
                "cache_identifiers": branches,
                "skip_predict_identifiers": inactive,
            },
            "taylorseer_diffusers",
            {"interval": 4, "order": 1, "first": 3, "dtype": "float32"},
        ),
        "diffusers PAB": Method(
            "diffusers",
            "PyramidAttentionBroadcastConfig",
            pab,
            "pab",
            {"ranges": ranges, "window": window},
            guide="together" if kind == "wan" else None,  # its counter and its memory are one for both halves
        ),
    }
    return found


QUICK = ("cache-dit F1B0", "cache-dit F1B0 Taylor", "diffusers FirstBlockCache", "diffusers TaylorSeer")
