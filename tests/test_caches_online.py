"""Caches that decide while they run, and those that act on guidance, by their rules in plain Python and golden data."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax import process as P
from difax.accel.caches import CACHES
from difax.accel.solvers import SOLVERS
from difax.guidance import GUIDES
from difax.noise import sample_keys
from difax.sample import make_rows, make_sampler
from tests.toys import QUICK, tanh_stack

FOLDER = pathlib.Path(__file__).parent / "golden"


def toy_run(accelerator: Any, guide: Any = None, steps: int = 16) -> tuple[np.ndarray, Any]:
    """A float64 run of the tanh network: Euler from tau = 1, scale 2."""
    with jax.enable_x64(True):
        model, params, x0 = tanh_stack()
        process, solver, guide = P.flow(time_scale=1.0), SOLVERS["euler"](), guide or GUIDES["none"]()
        rows = make_rows(solver, guide, process, np.linspace(1.0, 0.0, steps + 1), accelerator, model.stages)
        sampler = make_sampler(model, process, "velocity", solver, guide, accelerator)
        arguments = (params, jnp.asarray(x0), sample_keys(0, 1), jnp.ones(1), rows, 2.0)
        got, trace = sampler.lower(*arguments).compile(compiler_options=QUICK)(*arguments)
    return np.asarray(got), jax.tree.map(np.asarray, trace)


# ---------------------------------------------------------------- DBPrune, by what cache-dit 1.5.3 does

PRUNED = json.loads((FOLDER / "dbprune.json").read_text())
MASK = (1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1)
DBPRUNE: dict[str, dict[str, Any]] = {
    "F1B0_W2_R0.05": dict(threshold=0.05),
    "F1B0_W2_R0.1": dict(threshold=0.1),
    "F1B1_never3_W2_R0.1": dict(threshold=0.1, last=1, never=(3,)),
    "F1B0_W2_R1": dict(threshold=1.0),
    "F1B0_W2_R0.5_MC2": dict(threshold=0.5, max_continuous=2),
    "F1B0_W2_R0.1_M3": dict(threshold=0.1, max_cached=3),
    "F1B0_W6_I3_R0.1": dict(threshold=0.1, warmup=6, warmup_interval=3),
    "F1B0_SCM_static": dict(threshold=0.1, warmup=8, mask=MASK, policy="static"),
    "F1B0_SCM_dynamic_R0.1": dict(threshold=0.1, warmup=8, mask=MASK),
    "F1B0_W2_R0.08_dynamic": dict(threshold=0.08, dynamic=True),
    "F1B0_W2_R0.08_dynamic1.5_top0.5": dict(threshold=0.08, dynamic=True, relax=1.5, dynamic_limit=0.5),
    "F1B0_W2_R0.1_Acc0.1": dict(threshold=0.1),  # cache-dit's cap has no effect here
    "F1B0_W2_R0.1_CFGsep": dict(threshold=0.1),
}


def test_every_golden_configuration_of_dbprune_is_run():
    assert list(DBPRUNE) == list(PRUNED)


@pytest.mark.parametrize("name", DBPRUNE)
def test_dbprune_does_what_cache_dit_does(name):
    """In float64: the same blocks at every evaluation, the same differences, the same samples."""
    want, separate = PRUNED[name], name.endswith("CFGsep")
    guide = GUIDES["cfg"](together=False) if separate else None
    got, trace = toy_run(CACHES["dbprune"](**({"first": 1, "warmup": 2} | DBPRUNE[name])), guide)
    assert got.dtype == np.float64
    computed = trace.computed["blocks"][:, :, 0]  # [E, L, halves]
    for half, ran in enumerate([want["ran"], want["cfg_ran"]][: 1 + separate]):
        assert [list(np.flatnonzero(of)) for of in computed[:, :, half]] == ran
    gate = {k: a[:, :, 0] for k, a in trace.metric["block"]["blocks"].items()}
    for k, diffs in want["diffs"].items():
        asked = np.flatnonzero(gate["asked"][int(k)])
        assert len(asked) == len(diffs)
        for block, d in zip(asked, diffs, strict=True):
            assert d == -1 or gate["metric"][int(k), block] == pytest.approx(d, rel=1e-6)  # kept in float32
    np.testing.assert_array_equal(gate["asked"].any(1), [str(k) in want["diffs"] for k in range(16)])
    np.testing.assert_allclose([got.sum(), np.sqrt((got**2).sum())], [want["out_sum"], want["out_l2"]], rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -1.0}, "dbprune: threshold=-1.0; allowed: 0 or more"),
        ({"warmup_interval": 0}, "warmup_interval=0; allowed: 0 or more, and 1 or more"),
        ({"mask": (1, 2)}, r"mask=\(1, 2\); allowed: 1 \(compute\) and 0"),
        ({"policy": "statc"}, "policy='statc'; allowed: dynamic, static"),
        ({"relax": -1.0}, "relax=-1.0, dynamic_limit=None; allowed: 0 or more"),
        ({"first": 6}, "first=6, last=0, never=.*allowed: 0 or more, and blocks of the 6"),
        ({"never": (6,)}, r"never=\(6,\); allowed"),
        ({"mask": (1, 0)}, "dbprune: the mask has 2 entries; the run has 16 evaluations"),
    ],
)
def test_dbprune_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        toy_run(CACHES["dbprune"](**settings))
