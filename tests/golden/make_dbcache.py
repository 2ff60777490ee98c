"""Writes dbcache.json and dbprune.json of tests/golden from cache-dit's own code, run in float64 with torch.

The network is a toy: six blocks h + 0.5 tanh(h W + tau b) over x [1, 4, 8], sampled by 16 Euler steps from tau = 1 to
1 / 16 (x <- x - net(x, tau) / 16); where there are two branches, net = u + 2 (c - u) with c of x and u of 0.9 x.

dbcache.json, by configuration: cached, cfg_cached, the evaluations that reused in either branch; diffs, {evaluation:
difference} of the first branch; calls, of each block in both; out_sum and out_l2, of the samples.
dbprune.json: ran, cfg_ran, the blocks that each evaluation ran; diffs, those it measured; out_sum and out_l2.

Needs torch and cache-dit 1.5.3 (pip install --no-deps cache-dit==1.5.3; diffusers is what it imports):

  python tests/golden/make_dbcache.py [--check]
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from cache_dit.caching import CacheType, DBCacheConfig, DBPruneConfig, ForwardPattern
from cache_dit.caching.cache_blocks import UnifiedBlocks
from cache_dit.caching.cache_contexts import (
    CachedContextManager,
    FoCaCalibratorConfig,
    PrunedContextManager,
    TaylorSeerCalibratorConfig,
)

HERE = Path(__file__).resolve().parent
STEPS = 16
MASK = [1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1]


def config(threshold: float, warmup: int = 2, **others: Any) -> dict[str, Any]:
    first_block = dict(Fn_compute_blocks=1, Bn_compute_blocks=0)
    return first_block | dict(residual_diff_threshold=threshold, max_warmup_steps=warmup) | others


def taylor(order: int) -> Any:
    return TaylorSeerCalibratorConfig(taylorseer_order=order)


def refresh(hint: int, policy: str = "once") -> dict[str, Any]:
    """Counted in calls: separate halves make two an evaluation."""
    return dict(force_refresh_step_hint=hint, force_refresh_step_policy=policy)


MC = "max_continuous_cached_steps"
SEPARATE = dict(enable_separate_cfg=True)
SCM = dict(steps_computation_mask=MASK)
DBCACHE: dict[str, tuple[dict[str, Any], Any]] = {
    "none(thr=0)": (config(0.0), None),
    "F1B0_W2_R0.05": (config(0.05), None),
    "F1B0_W2_R0.10": (config(0.1), None),
    "F1B0_W2_R0.5_MC2": (config(0.5, **{MC: 2}), None),
    "F1B0_W6_I3_R0.5_MC3": (config(0.5, 6, warmup_interval=3, **{MC: 3}), None),
    "F1B0_W4_R0.5_MC3_TS1": (config(0.5, 4, **{MC: 3}), taylor(1)),
    "F1B0_W4_R0.5_MC3_TS2": (config(0.5, 4, **{MC: 3}), taylor(2)),
    "F1B0_W2_R0.5_MC3_TS1": (config(0.5, 2, **{MC: 3}), taylor(1)),
    "F1B0_SCM_static": (config(0.1, 8, **SCM, steps_computation_policy="static"), None),
    "F1B0_SCM_dynamic_R0.05": (config(0.05, 8, **SCM, steps_computation_policy="dynamic"), None),
    "F1B0_W2_R0.5_AccR0.3": (config(0.5, max_accumulated_residual_diff_threshold=0.3), None),
    "F1B0_W2_R0.10_CFGsep": (config(0.1, **SEPARATE), None),
    "FoCa_F1B0_W4_R0.5_MC3": (config(0.5, 4, **{MC: 3}), FoCaCalibratorConfig()),
    "F1B0_W2_R0.10_CFGsep_onediff": (config(0.1, **SEPARATE, cfg_diff_compute_separate=False), None),
    "F1B0_W2_R0.5_MC2_M5_CFGsep_onediff": (
        config(0.5, **{MC: 2}, max_cached_steps=5, **SEPARATE, cfg_diff_compute_separate=False),
        None,
    ),
    "F1B0_W2_R0.5_MC3_FR7": (config(0.5, **{MC: 3}, **refresh(7)), None),
    "F1B0_W2_R0.5_M3_AccR0.3_FR5repeat": (
        config(0.5, max_cached_steps=3, max_accumulated_residual_diff_threshold=0.3, **refresh(5, "repeat")),
        None,
    ),
    "F1B0_W3_R0.5_MC3_TS1_FR7": (config(0.5, 3, **{MC: 3}, **refresh(7)), taylor(1)),
    "F1B0_SCM_dynamic_R0.1_FR6repeat": (
        config(0.1, 8, **SCM, steps_computation_policy="dynamic", **refresh(6, "repeat")),
        None,
    ),
    "F1B0_W2_R0.10_FR12_CFGsep": (config(0.1, **SEPARATE, **refresh(12)), None),
    "FoCa_F1B0_W2_R0.5_MC3_FR8": (config(0.5, 2, **{MC: 3}, **refresh(8)), FoCaCalibratorConfig()),
}
DYNAMIC = dict(enable_dynamic_prune_threshold=True)
DBPRUNE: dict[str, dict[str, Any]] = {
    "F1B0_W2_R0.05": config(0.05),
    "F1B0_W2_R0.1": config(0.1),
    "F1B1_never3_W2_R0.1": config(0.1, Bn_compute_blocks=1, non_prune_block_ids=[3]),
    "F1B0_W2_R1": config(1.0),
    "F1B0_W2_R0.5_MC2": config(0.5, **{MC: 2}),
    "F1B0_W2_R0.1_M3": config(0.1, max_cached_steps=3),
    "F1B0_W6_I3_R0.1": config(0.1, 6, warmup_interval=3),
    "F1B0_SCM_static": config(0.1, 8, **SCM, steps_computation_policy="static"),
    "F1B0_SCM_dynamic_R0.1": config(0.1, 8, **SCM, steps_computation_policy="dynamic"),
    "F1B0_W2_R0.08_dynamic": config(0.08, **DYNAMIC),
    "F1B0_W2_R0.08_dynamic1.5_top0.5": config(
        0.08, **DYNAMIC, dynamic_prune_threshold_relax_ratio=1.5, max_dynamic_prune_threshold=0.5
    ),
    "F1B0_W2_R0.1_Acc0.1": config(0.1, max_accumulated_residual_diff_threshold=0.1),
    "F1B0_W2_R0.1_CFGsep": config(0.1, **SEPARATE),
    "F1B0_W2_R0.1_M3_FR7": config(0.1, max_cached_steps=3, **refresh(7)),
    "F1B0_W2_R0.1_MC2_FR5repeat": config(0.1, **{MC: 2}, **refresh(5, "repeat")),
}


def toy() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r = np.random.default_rng(0)
    w = r.standard_normal((6, 8, 8)) * 0.6 / np.sqrt(8)
    b = r.standard_normal((6, 8)) * 0.5
    return torch.from_numpy(w), torch.from_numpy(b), torch.from_numpy(r.standard_normal((1, 4, 8)))


class Block(torch.nn.Module):
    def __init__(self, i: int, w: torch.Tensor, b: torch.Tensor, log: list[int]):
        super().__init__()
        self.i, self.w, self.b, self.log = i, w, b, log

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, tau: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.log.append(self.i)
        return hidden_states + 0.5 * torch.tanh(hidden_states @ self.w + tau * self.b), encoder_hidden_states


def run(kind: CacheType, settings: dict[str, Any], calibrator: Any = None) -> Any:
    """A run through cache-dit's blocks: its context, the blocks that each call ran, and the samples."""
    w, b, x = toy()
    log: list[int] = []
    blocks = torch.nn.ModuleList(Block(i, w[i], b[i], log) for i in range(6))
    prune = kind == CacheType.DBPrune
    manager = (PrunedContextManager if prune else CachedContextManager)(name="toy")
    settings = {"enable_separate_cfg": False, **settings}
    made = (DBPruneConfig if prune else DBCacheConfig)(**settings)
    manager.new_context(name="blocks", cache_config=made, calibrator_config=calibrator)
    cached = UnifiedBlocks(
        blocks,
        transformer=torch.nn.Module(),
        forward_pattern=ForwardPattern.Pattern_0,
        cache_prefix="blocks",
        cache_context="blocks",
        context_manager=manager,
        cache_type=kind,
    )
    encoder = torch.zeros(1, 1, 8, dtype=torch.float64)
    ran: list[list[int]] = []
    diffs: dict[str, Any] = {}  # of the first branch
    halves = 2 if settings["enable_separate_cfg"] else 1

    def net(x: torch.Tensor, tau: float) -> torch.Tensor:
        log.clear()
        out, _ = cached(x, encoder, tau)
        now = manager.get_context()  # a refresh makes another one, which counts anew
        diff = now.get_residual_diffs().get(str(now.get_current_step()))
        if diff is not None and len(ran) % halves == 0:
            diffs[str(len(ran) // halves)] = diff
        ran.append(list(log))
        return out

    for k in range(STEPS):
        tau = 1 - k / STEPS
        v = net(x, tau)
        if settings["enable_separate_cfg"]:
            u = net(0.9 * x, tau)
            v = u + 2.0 * (v - u)
        x = x - v / STEPS
    return SimpleNamespace(diffs=diffs, ran=[ran[h::halves] for h in range(halves)], x=x.numpy())


def result(x: np.ndarray) -> dict[str, float]:
    return {"out_sum": float(x.sum()), "out_l2": float(np.sqrt((x**2).sum()))}


def dbcache(settings: dict[str, Any], calibrator: Any) -> dict[str, Any]:
    r = run(CacheType.DBCache, settings, calibrator)
    blocks = [i for half in r.ran for call in half for i in call]
    cached = [[k for k, call in enumerate(half) if 1 not in call] for half in r.ran]
    return {
        "cached": cached[0],
        "cfg_cached": cached[1] if len(cached) > 1 else [],
        "diffs": {k: float(d) for k, d in r.diffs.items()},
        "calls": [blocks.count(i) for i in range(6)],
        **result(r.x),
        "pruned": None,
    }


def dbprune(settings: dict[str, Any]) -> dict[str, Any]:
    r = run(CacheType.DBPrune, settings)
    diffs = {k: [float(d) for d in of] for k, of in r.diffs.items()}
    return {"ran": r.ran[0], "cfg_ran": r.ran[1] if len(r.ran) > 1 else [], "diffs": diffs, **result(r.x)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the files, write nothing")
    check = parser.parse_args().check
    made = {
        "dbcache.json": {name: dbcache(*arguments) for name, arguments in DBCACHE.items()},
        "dbprune.json": {name: dbprune(settings) for name, settings in DBPRUNE.items()},
    }
    for name, data in made.items():
        if not check:
            lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()]
            (HERE / name).write_text("{\n" + ",\n".join(lines) + "\n}\n")
            continue
        kept, worst = json.loads((HERE / name).read_text()), 0.0
        assert list(kept) == list(data), name
        for key, now in data.items():
            (a, shape), (b, other) = numbers(kept[key]), numbers(now)
            assert shape == other, (name, key)
            worst = max(worst, *np.abs(np.subtract(a, b)), 0.0)
        print(f"{name}: {len(kept)} configurations, largest difference {worst:.2e}")


def numbers(tree: Any) -> tuple[list[float], Any]:
    """The fractions in a tree of JSON, and the tree without them."""
    if isinstance(tree, float):
        return [tree], None
    if isinstance(tree, dict):
        parts = {k: numbers(v) for k, v in tree.items()}
        return [n for p, _ in parts.values() for n in p], {k: s for k, (_, s) in parts.items()}
    if isinstance(tree, list):
        parts = [numbers(v) for v in tree]
        return [n for p, _ in parts for n in p], [s for _, s in parts]
    return [], tree


if __name__ == "__main__":
    main()
