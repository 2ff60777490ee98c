"""Caches with a static plan: golden schedules, plans against plain rules, sampled results against plain loops."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from difax.accel.caches import CACHES
from difax.accel.caches.bacache import bacache
from difax.accel.caches.block_caching import block_caching
from difax.accel.caches.magcache import RATIOS, magcache, nearest
from difax.accel.caches.masks import steps_mask
from difax.accel.caches.smoothcache import smoothcache
from difax.accel.solvers import SOLVERS
from difax.core.contracts import Accelerator, Stage
from difax.core.cost import model_cost, run_cost
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import GUIDES
from difax.core.process import flow, vp_linear
from difax.core.sample import make_rows
from difax.core.stack import with_learned
from tests.oracles import plans as oracle
from tests.test_caches import LABELS, pieces, problem
from tests.toys import tiny_dit

E = 6  # evaluations of the sampled runs
XL = (Stage("blocks", 28, None, ("attn", "mlp")),)
FLUX = (Stage("double", 2, None, ("attn", "mlp")), Stage("single", 4, None, ("attn_mlp",)))
PIXART = (Stage("blocks", 3, None, ("attn", "cross", "mlp")),)


def rows(accelerator: Accelerator, stages=XL, steps=50, guide="none", process=None, bounds=()):
    process = process or vp_linear()
    times = make_times(GRIDS["uniform"](), process, steps)
    return make_rows(SOLVERS["ddim"](), GUIDES[guide](*bounds), process, times, accelerator, stages)


def computed(accelerator: Accelerator, stages=XL, **run) -> dict:
    """{(stage, branch): bool [E, L]} of a plan of branches."""
    plan = rows(accelerator, stages, **run).plan
    flags = {}
    for s in stages:
        for b in s.branches:
            doing = [dict(plan.modes[m]).get((s.name, b)) for m in plan.index]
            layers = plan.values.get(s.name, {}).get(b, {}).get("layers")
            full = [layers[e] if d == "mixed" else np.full(s.depth, d != "fill") for e, d in enumerate(doing)]
            flags[s.name, b] = np.asarray(full, bool)
    return flags


def text(flags) -> str:
    """F where all layers are computed, . where none is, * for a mixture."""
    return "".join("F" if f.all() else "*" if f.any() else "." for f in np.asarray(flags))


def spans(accelerator: Accelerator, stages=XL, **run) -> list:
    plan = rows(accelerator, stages, **run).plan
    return [plan.modes[m][0] for m in plan.index]


# ---------------------------------------------------------------- FORA


@pytest.mark.parametrize("steps, interval, full", [(50, 3, 18), (50, 2, 26), (250, 3, 84), (20, 2, 11)])
def test_fora_dit_has_the_authors_clock(steps, interval, full):
    got = text(computed(CACHES["fora_dit"](interval), steps=steps)["blocks", "attn"])
    assert got == oracle.fora_steps(steps, interval) and got.count("F") == full
    if (steps, interval) == (50, 3):
        assert got.startswith("FF..F..F..F") and got.endswith("F..F")


# ---------------------------------------------------------------- SmoothCache


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.4, 1.0, 3.0])
def test_smoothcache_is_the_authors_greedy_scan(alpha):
    error = np.random.default_rng(1).random((50, 3)) + np.arange(3) / 3
    held = [error[: 50 - k, k - 1] for k in (1, 2, 3)]
    got = computed(smoothcache(errors={"attn": error}, alpha=alpha))
    want = oracle.smooth_schedule(held, alpha, 50)
    np.testing.assert_array_equal(got["blocks", "attn"][:, 0], want)
    assert got["blocks", "mlp"].all()  # not named
    assert sum(want) == 50 if alpha == 0 else sum(want) < 50


def test_smoothcache_of_small_neighbouring_errors_is_the_published_fora_schedule():
    error = np.tile([0.1, 0.9, 0.9], (50, 1))
    got = text(computed(smoothcache(errors={"attn": error, "mlp": error}, alpha=0.1))["blocks", "mlp"])
    assert got == "F." * 24 + "FF"  # 50-N-2-fora.json of the authors


def test_smoothcache_reads_calibrations_and_published_schedules(tmp_path):
    error = [[0.1, 0.5, None], [0.5, 0.5, None], [0.05, 0.1, None], [0.1, None, None], [0.3, None, None], [None] * 3]
    written = {
        "technique": "smoothcache", "model": "dit", "solver": "ddim", "steps": 6, "data": "2 samples", "kmax": 3,
        "errors": {"blocks": {"attn": error}},
    }  # fmt: skip
    file = tmp_path / "calibrated.json"
    file.write_text(json.dumps(written))
    cache = smoothcache(file=str(file), alpha=0.2)
    assert text(computed(cache, steps=6)["blocks", "attn"]) == "F.F..F"
    with pytest.raises(ValueError, match="measured over 6 evaluations; allowed: the 7 of this run"):
        rows(cache, steps=7)
    for wrong, message in [
        ({"errors": {"blocks": {"atn": error}}}, r"no branch of blocks 'atn' .*did you mean attn\?"),
        ({"errors": {"block": {"attn": error}}}, r"no stage 'block' .*did you mean blocks\?"),
        ({"errors": {"blocks": {"attn": error[:5]}}}, "blocks.attn are 5 x 3; allowed: 6 x any"),
        ({"errors": {"blocks": {"attn": "no"}}}, "blocks.attn are no table"),
        ({"technique": "bacache"}, "measured for bacache; allowed: smoothcache"),
    ]:
        file.write_text(json.dumps(written | wrong))
        with pytest.raises(ValueError, match=message):
            rows(smoothcache(file=str(file)), steps=6)
    file.write_text(json.dumps({"attn": [1, 0, 0, 1], "mlp-0": [1, 1, 0, 1], "mlp-1": [1, 0, 0, 1]}))
    got = computed(smoothcache(file=str(file)), tiny_dit()[0].stages, steps=4)
    assert text(got["blocks", "attn"]) == "F..F" and text(got["blocks", "mlp"]) == "F*.F"


# ---------------------------------------------------------------- learned routers


@pytest.mark.parametrize("steps", [20, 21])
def test_learning_to_cache_alternates_by_the_authors_counter(steps):
    """cur = T - 1 ... 0: the cache is cleared at odd cur, so that all is computed there; rank[cur] elsewhere."""
    logits = np.random.default_rng(0).normal(-2.2, 1, (steps, 28, 2))  # the threshold is at -2.197
    got = computed(CACHES["learning_to_cache"](logits), steps=steps)
    empty = True
    for i, cur in enumerate(range(steps - 1, -1, -1)):
        empty |= cur % 2 == 1
        for layer in range(28):
            for j, branch in enumerate(("attn", "mlp")):
                want = empty or 1 / (1 + np.exp(-logits[i, layer, j])) > 0.1
                assert got["blocks", branch][i, layer] == want
        empty = False


def test_harmonica_may_reuse_at_every_evaluation_but_the_first(tmp_path):
    logits = np.random.default_rng(0).normal(-2.2, 1, (20, 28, 2))
    np.savez(tmp_path / "routers.npz", blocks=logits)
    got = computed(CACHES["harmonica"](file=str(tmp_path / "routers.npz")), steps=20)
    want = 1 / (1 + np.exp(-logits)) > 0.1
    want[0] = True
    assert 0.3 < want.mean() < 0.7
    np.testing.assert_array_equal(np.stack([got["blocks", "attn"], got["blocks", "mlp"]], -1), want)


# ---------------------------------------------------------------- PAB


def test_pab_is_diffusers_on_a_flux_grid():
    """20 evaluations at 1000, 950, ... 50: the blocks whose attention diffusers 0.42 computes, 6 for all."""
    cache = CACHES["pab"]({"attn": 2, "attn_mlp": 2}, window=(100, 800))
    got = computed(cache, FLUX, steps=20, process=flow())
    want = "66666060606060606066".replace("6", "F").replace("0", ".")
    assert text(got["double", "attn"]) == want == text(got["single", "attn_mlp"])
    assert got["double", "mlp"].all()
    at_bounds = computed(CACHES["pab"]({"attn": 2}, window=(150, 850)), FLUX, steps=20, process=flow())
    assert text(at_bounds["double", "attn"]) == "FFFFF" + ".F" * 5 + ".FFFF"  # 850 and 150 are outside


def test_pab_ranges_windows_and_mlp():
    time = 1000 * (1 - np.arange(30) / 30)
    cache = CACHES["pab"](window=(450, 930), mlp=(864, 788, 676), mlp_blocks=2)
    got = computed(cache, PIXART, steps=30, process=flow())
    for branch, interval in (("attn", 2), ("cross", 6)):
        want = [i % interval == 0 or not 450 < t < 930 for i, t in enumerate(time)]
        np.testing.assert_array_equal(got["blocks", branch], np.tile(np.asarray(want)[:, None], (1, 3)))
    # the evaluations nearest to the three timesteps are 4, 6 and 10; the third block takes no part
    assert text(got["blocks", "mlp"]) == "F" * 5 + "*F**FF**" + "F" * 17
    assert got["blocks", "mlp"][:, 2].all()
    assert computed(CACHES["pab"](), FLUX, steps=20, process=flow())["single", "attn_mlp"].all()


# ---------------------------------------------------------------- spans


def test_delta_dit_holds_the_rear_first_and_the_front_later():
    got = spans(CACHES["delta_dit"](), steps=20)
    want = [None if i % 2 == 0 else (7, 28) if 20 - i > 12 else (0, 21) for i in range(20)]
    assert got == want and {(7, 28), (0, 21)} <= set(got)
    blocks = np.mean([1 if s is None else 1 - (s[1] - s[0]) / 28 for s in got])
    assert 1 / blocks == pytest.approx(1.6)  # the paper's speed-up on 20 steps
    assert spans(CACHES["delta_dit"](cutoff=13), steps=20)[5:8] == [(7, 28), None, (0, 21)]
    assert spans(CACHES["delta_dit"](cutoff=0, blocks=4), steps=4) == [None, (24, 28), None, (24, 28)]


def test_magcache_golden_schedules():
    """Ratios of one: diffusers' MagCache at its defaults on 20 steps."""

    def got(*arguments, **settings):
        return "".join("F" if s is None else "." for s in spans(magcache(*arguments, **settings), steps=20))

    assert got([1.0]) == "FFFF...F...F...F...F"
    assert got([1.0], streak=0) == "F" * 20
    assert got([1.3] * 20) == "F" * 20
    assert got([1.0], retention=1.0) == "F" * 20


@pytest.mark.parametrize("settings", [(0.06, 3, 0.2), (0.24, 5, 0.1), (0.12, 2, 0.25), (0.5, 9, 0.0)])
@pytest.mark.parametrize("ratios", ["flux", "drawn"])
def test_magcache_sums_the_deviations_of_the_cumulative_ratio(ratios, settings):
    drawn = 1 + 0.05 * np.random.default_rng(0).standard_normal(28)
    given = drawn if ratios == "drawn" else ratios
    threshold, streak, retention = settings
    cache = magcache(given, threshold=threshold, streak=streak, retention=retention)
    got = "".join("F" if s is None else "." for s in spans(cache, steps=28))
    numbers = drawn if ratios == "drawn" else RATIOS["flux"]
    assert got == oracle.magnitude_skips(numbers, threshold, streak, retention)
    assert "." in got


def test_magcache_takes_the_ratios_of_another_length_at_the_nearest_evaluation(tmp_path):
    np.testing.assert_array_equal(nearest(np.arange(5.0), 9), [0, 0, 1, 2, 2, 2, 3, 4, 4])  # halves to even
    np.testing.assert_array_equal(nearest(np.arange(9.0), 5), [0, 2, 4, 6, 8])
    file = tmp_path / "ratios.json"
    file.write_text(json.dumps({"technique": "magcache", "steps": 5, "ratios": [1, 1, 1.2, 1, 1]}))
    held = ["." if s else "F" for s in spans(magcache(file=str(file), retention=0.0, streak=9), steps=9)]
    assert "".join(held) == "F..FFF..."  # the ratio 1.2 at 3, 4 and 5


def magnitude_skips_of_both(pairs, threshold, streak, retention) -> str:
    """MagCache of two halves that run in one batch: an evaluation is left out where both would be."""
    done, last, total = "", 0, np.zeros(2)
    for t in range(len(pairs)):
        early = t < max(1, int(retention * len(pairs) + 0.5))
        total = total + abs(1 - np.prod(pairs[last + 1 : t + 1], axis=0))
        if early or total.max() > threshold or t - last > streak:
            done, last, total = done + "F", t, np.zeros(2)
        else:
            done += "."
    return done


def test_magcache_takes_lists_of_both_halves_apart():
    """As the authors publish them: conditional and unconditional in turn, two ones first, taken at the nearest of its
    own half."""
    rng = np.random.default_rng(0)
    pairs = np.concatenate([np.ones((1, 2)), 1 + 0.03 * rng.standard_normal((49, 2))])
    lists = pairs.ravel().tolist()

    def got(ratios, guide="cfg", steps=50, **settings):
        cache = magcache(ratios, threshold=0.06, streak=5, **settings)
        return "".join("F" if s is None else "." for s in spans(cache, steps=steps, guide=guide))

    want = magnitude_skips_of_both(pairs, 0.06, 5, 0.2)
    assert got(lists) == got(pairs.T.tolist()) == got(lists, halves=2) == want
    alone = [oracle.magnitude_skips(pairs[:, half], 0.06, 5, 0.2) for half in (0, 1)]
    assert want not in alone and got(lists, guide="none") == alone[0]  # the conditional half is the only one
    at = [round(t * 49 / 19) for t in range(20)]
    assert got(lists, steps=20) == magnitude_skips_of_both(pairs[at], 0.06, 5, 0.2)
    # twice as many numbers as a guided run has evaluations, with whatever they begin
    drifting = np.ravel([[1.15, 1.0]] * 20).tolist()
    np.testing.assert_array_equal(nearest(np.asarray(drifting), 20), [[1.15, 1.0]] * 20)
    assert got(drifting, steps=20) == "F" * 20
    assert got(drifting[1::2], steps=20) == got(drifting[1::2] + drifting[1::2], steps=20) != "F" * 20
    # one list where the run has no second half, and where it has as many numbers as the run has evaluations
    one = 1 + 0.03 * rng.standard_normal(40)
    assert got(one, "none", 20) == got(nearest(one, 20, guided=False), "none", 20) == got(one, "cfg", 20, halves=1)
    assert got(one, "cfg", 40) == got(one, "none", 40)


def test_nothing_is_held_where_guidance_begins():
    """The third of six evaluations wakes the unconditional half up."""
    options = {"steps": 6, "guide": "interval", "bounds": (0.1, 0.7)}
    stages = tiny_dit()[0].stages
    got = spans(magcache([1.0], retention=0.0, streak=2), stages, **options)
    assert got == [None, (0, 2), None, (0, 2), (0, 2), None]  # the streak begins anew
    change = {"attn": np.full((2, 6), 0.2)}
    got = computed(block_caching(change), stages, **options)
    assert text(got["blocks", "attn"]) == "F.F..F"  # 0.6 since the forced one, not since the first


# ---------------------------------------------------------------- block caching, BAC


def test_block_caching_refreshes_each_layer_when_its_change_adds_up():
    change = np.random.default_rng(0).random((28, 50)) * 0.3
    got = computed(block_caching({"attn": change}, threshold=0.5))["blocks", "attn"]
    for layer in range(28):
        last = 0
        for i in range(1, 50):
            over = change[layer, last + 1 : i + 1].sum() > 0.5
            assert got[i, layer] == over
            last = i if over else last
    assert 0.2 < got.mean() < 0.4


@pytest.mark.parametrize("updates", [1, 2, 4, 9, 10])
def test_bac_finds_the_best_of_all_schedules(updates):
    similarity = np.random.default_rng(2).random((3, 10, 10))
    cache = bacache({"attn": similarity}, updates=updates, bubble=0)
    got = computed(cache, PIXART, steps=10)["blocks", "attn"]
    for layer in range(3):
        assert set(np.flatnonzero(got[:, layer])) == oracle.best_updates(similarity[layer], updates)[1]


def test_bac_bubbles_the_updates_of_later_mlps_up(tmp_path):
    rng = np.random.default_rng(3)
    similarity = {b: rng.random((3, 10, 10)) for b in ("attn", "cross", "mlp")}
    spread = {b: rng.random(3) for b in similarity}
    spread["attn"][2] = 2.0  # chosen: the MLP of its own layer, the last, is behind it too
    cache = bacache(similarity, spreads=spread, updates=3, bubble=4)
    got = computed(cache, PIXART, steps=10)
    alone = computed(bacache(similarity, updates=3, bubble=0), PIXART, steps=10)
    sites = [(layer, b) for layer in range(3) for b in similarity]
    want = oracle.bubbled(
        {(n, b): set(np.flatnonzero(alone["blocks", b][:, n])) for n, b in sites},
        {(n, b): spread[b][n] for n, b in sites},
        4,
    )
    assert {(n, b): set(np.flatnonzero(got["blocks", b][:, n])) for n, b in sites} == want
    assert sum(map(len, want.values())) > 27
    file = tmp_path / "bac.json"
    tables = {"similarities": similarity, "spreads": spread}
    lists = {k: {"blocks": {b: v.tolist() for b, v in of.items()}} for k, of in tables.items()}
    file.write_text(json.dumps({"technique": "bacache", "steps": 10, **lists}))
    again = computed(bacache(file=str(file), updates=3, bubble=4), PIXART, steps=10)
    for site in got:
        np.testing.assert_array_equal(again[site], got[site])


# ---------------------------------------------------------------- step masks

MASKS = {
    ("slow", 28): "1111111101110011100110010001",
    ("medium", 28): "1111110110001100011000110001",
    ("fast", 28): "1111110100010000100000100001",
    ("ultra", 28): "1111001000001000000100000001",
    ("fast", 50): "11111111111001100000110000000110000000001100000001",
    ("ultra", 50): "11111110001100000000011000000000001100000000000001",
    ("slow", 12): "111101101111",
    ("medium", 9): "111110101",
    ("ultra", 8): "11001001",
    ("slow", 6): "111001",
    ("fast", 4): "1101",
}


@pytest.mark.parametrize("policy, steps", MASKS)
def test_steps_mask_is_cache_dits(policy, steps):
    mask = steps_mask(total_steps=steps, policy=policy)
    assert "".join(map(str, mask)) == MASKS[policy, steps]
    if steps == 28:
        assert sum(mask) == {"slow": 18, "medium": 15, "fast": 11, "ultra": 8}[policy]


def test_steps_mask_of_bins_and_in_dbcache():
    assert steps_mask((4, 2, 2, 1), (3, 4, 4)) == (1,) * 4 + (0,) * 3 + (1, 1) + (0,) * 4 + (1, 1) + (0,) * 4 + (1,)
    assert steps_mask((2, 1), (3,), 4) == (1, 1, 0, 0)
    cache = CACHES["dbcache"](mask=steps_mask(total_steps=28, policy="ultra"), policy="static", first=1)
    force = rows(cache, steps=28).plan.values.force
    assert "".join("1" if f == 1 else "0" for f in force) == MASKS["ultra", 28]


# ---------------------------------------------------------------- sampled results


@pytest.fixture(scope="module")
def toy():
    """A guided DDIM run on a tiny DiT, its network in pieces, and the arguments of the oracle's sampler."""
    p = problem()
    _, x, _, labels = p.inputs()
    plain = p.rows()
    abar = np.append(p.process.level(plain.t.astype(np.float64)).alpha ** 2, 1.0)
    return (
        p,
        pieces(p),
        np.round(plain.model_time).astype(int),
        (np.asarray(x), abar, labels, p.model.null(LABELS), 2.0),
    )


def agree(p, cache, want, halves=None):
    """The sampler with the cache gives the oracle's samples; returns the trace."""
    got, trace = p._replace(params=with_learned(p.params, cache)).run(cache)
    plain = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * plain)
    np.testing.assert_array_equal(trace.halves, halves or [2] * E)
    return trace


def test_a_plan_by_layers_with_learned_adjustments(toy, tmp_path):
    """Block caching: every layer and branch has its own schedule, and its own scales and shifts for what it holds."""
    p, network, k, arguments = toy
    rng = np.random.default_rng(0)
    changes = {b: rng.random((2, E)) * 0.6 for b in ("attn", "mlp")}
    adjust = {
        f"blocks.{b}.{part}": (part == "scale") + 0.3 * rng.standard_normal((2, E, 16)).astype(np.float32)
        for b in ("attn", "mlp")
        for part in ("scale", "shift")
    }
    np.savez(tmp_path / "adjust.npz", **adjust)
    cache = block_caching(changes, adjust=str(tmp_path / "adjust.npz"))
    flags = computed(cache, p.model.stages, steps=E)

    def stands_in(i, layer, name, update, memory):
        if flags["blocks", name][i, layer]:
            memory[layer, name] = update
            return update
        scale, shift = (adjust[f"blocks.{name}.{part}"][layer, i] for part in ("scale", "shift"))
        return memory[layer, name] * scale + shift

    trace = agree(p, cache, oracle.ddim(oracle.through_branches(network, k, stands_in), *arguments))
    want = np.stack([flags["blocks", b] for b in ("attn", "mlp")], -1)
    np.testing.assert_array_equal(trace.computed["blocks"][..., 0], want)
    assert len(np.unique(want.reshape(E, 4), axis=1).T) > 2 and 0.3 < want.mean() < 0.9  # schedules differ
    with pytest.raises(ValueError, match="with_learned"):
        p.run(cache)


@pytest.mark.parametrize("where, order, full", [("branches", 3, "FFFF.F"), ("output", 2, "FFF..F")])
def test_ab_cache_extrapolates_through_the_last_values(toy, where, order, full):
    """A parabola through evaluations 1 to 3; a line through 1 and 2."""
    p, network, k, arguments = toy
    cache = CACHES["ab_cache"](order, interval=5 - order, first=order + 1, where=where)
    ran = [int(f == "F") for f in full]

    def value(i, key, fresh, memory):
        if ran[i]:
            memory.setdefault(key, []).append((i, fresh()))
            return memory[key][-1][1]
        return oracle.extrapolated(memory[key][-order:], i).astype(np.float32)

    if where == "branches":
        run = oracle.through_branches(network, k, lambda i, n, b, update, m: value(i, (n, b), lambda: update, m))
    else:
        plain = oracle.through_branches(network, k, lambda i, n, b, update, m: update)

        def run(i, x, labels, memory):
            return value(i, "output", lambda: np.asarray(plain(i, x, labels, {})), memory)

    trace = agree(p, cache, oracle.ddim(run, *arguments), [2 * r for r in ran] if where == "output" else None)
    np.testing.assert_array_equal(trace.computed["blocks"].mean((1, 2, 3)), ran)
    if where == "output":
        np.testing.assert_array_equal(trace.entered["blocks"].mean((1, 2)), ran)
        cost = model_cost(p.model, p.params)
        assert run_cost(cost, trace) == 8 * cost.evaluation  # two halves of four evaluations, and nothing else


def test_frdiff_mixes_the_keyframes_output_with_reused_features(toy):
    """Keyframes 0 and 3; the weight of reuse is 0 at evaluation 1, between at 2 and 4, 1 at 5."""
    p, network, k, arguments = toy
    cache = CACHES["frdiff"](interval=3, bias=0.5, slope=8.0)
    weight = [min(1, max(0, (8 * (i / E - 0.5) + 2) / 4)) for i in range(E)]
    assert weight[1] == 0 < weight[2] < 1 and 0 < weight[4] < 1 == weight[5]

    def stands_in(i, layer, name, update, memory):
        if i % 3 == 0:
            memory[layer, name] = update
        return memory[layer, name]

    inner = oracle.through_branches(network, k, stands_in)

    def run(i, x, labels, memory):
        out = np.asarray(inner(i, x, labels, memory))
        if i % 3 == 0:
            memory["output"] = out
            return out
        return weight[i] * out + (1 - weight[i]) * memory["output"]

    trace = agree(p, cache, oracle.ddim(run, *arguments), [2, 0, 2, 2, 2, 2])
    np.testing.assert_array_equal(trace.computed["blocks"].mean((1, 2, 3)), [1, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(trace.entered["blocks"].mean((1, 2)), [1, 0, 1, 1, 1, 1])


@pytest.mark.parametrize("name", ["delta_dit", "magcache"])
def test_spans_add_their_last_residual(toy, name):
    p, network, k, arguments = toy
    settings = {"delta_dit": {"interval": 3, "cutoff": 2, "blocks": 1}, "magcache": {"ratios": [1.0]}}
    want = {
        "delta_dit": [None, (1, 2), (1, 2), None, (0, 1), (0, 1)],
        "magcache": [None, (0, 2), (0, 2), (0, 2), None, (0, 2)],
    }[name]
    agree(p, CACHES[name](**settings[name]), oracle.ddim(oracle.through_spans(network, k, want), *arguments))


def test_attention_maps_are_reused_with_fresh_values(toy):
    """Softmax maps of evaluations 0 and 3 stand in at 1, 2, 4 and 5: in numpy, with the values of that evaluation."""
    p, network, k, arguments = toy
    cache = CACHES["attention_map"](schedule=(1, 0, 0, 1, 0, 0))
    block = p.model.stages[0].block

    def run(i, x, labels, memory):
        tokens, context = network.embed(x.astype(np.float32), k[i], labels)
        for layer in range(network.depth):
            weights = {"params": {n: {m: a[layer] for m, a in of.items()} for n, of in p.params["blocks"].items()}}
            mods = block.apply(weights, context, method="mods")

            def attend(q, key, v, layer=layer):
                q, key, v = (np.asarray(a, np.float64) for a in (q, key, v))
                if i % 3 == 0:
                    logits = np.einsum("bthk,bshk->bhts", q, key) / np.sqrt(q.shape[-1])
                    grown = np.exp(logits - logits.max(-1, keepdims=True))
                    memory[layer] = grown / grown.sum(-1, keepdims=True)
                return jnp.asarray(np.einsum("bhts,bshk->bthk", memory[layer], v), jnp.float32)

            for name in ("attn", "mlp"):
                update = block.apply(weights, tokens, mods, context, attend, method=name)
                tokens = tokens + block.apply(weights, mods, name, method="gate") * update
        return network.head(tokens, context)

    trace = agree(p, cache, oracle.ddim(run, *arguments))
    # qkv 4 x 16 x 48, out 4 x 16 x 16, and 2 heads of 4 x 4 x 8 twice: q k^T is 256 of 4608 multiply-adds
    part = np.float32(1 - 256 / 4608)
    np.testing.assert_array_equal(trace.computed["blocks"][:, 0, 0, 0], [1, part, part, 1, part, part])
    np.testing.assert_array_equal(trace.computed["blocks"][:, :, 1], 1)
    plain, q_k = model_cost(p.model, p.params).evaluation, 2 * 256
    saved = 2 * 4 * 2 * q_k  # halves, evaluations, layers
    assert run_cost(model_cost(p.model, p.params), trace) == pytest.approx(12 * plain - saved)


# ---------------------------------------------------------------- refusals

ONES = np.ones((2, E))
REFUSED = [
    ("fora_dit", {"interval": 0}, "interval=0; allowed: 1 or more"),
    ("smoothcache", {}, "nothing was given; allowed: one of schedule, errors and file"),
    ("smoothcache", {"schedule": {}, "file": "x"}, "schedule and file was given"),
    ("smoothcache", {"schedule": {}, "alpha": -1.0}, "alpha=-1.0; allowed: 0 or more"),
    ("smoothcache", {"file": "nowhere.json"}, "file='nowhere.json': no such file"),
    ("smoothcache", {"schedule": {"attn": (1, 0, 1)}}, "schedule of attn is 3; allowed: .* 6 evaluations"),
    ("smoothcache", {"schedule": {"attn": (1, 2, 1, 1, 1, 1)}}, "allowed: 1 and 0"),
    ("smoothcache", {"schedule": {"cross": (1,) * E}}, "no branch 'cross' in this model; allowed: attn, mlp"),
    ("smoothcache", {"errors": {"attn": ONES}}, "blocks.attn are 2 x 6; allowed: 6 x any"),
    ("learning_to_cache", {}, "allowed: the logits of trained routers, or a file"),
    ("learning_to_cache", {"file": "routers.pt"}, "file='routers.pt'; allowed: an .npz file"),
    ("learning_to_cache", {"logits": ONES, "threshold": 2.0}, "threshold=2.0; allowed: 0 to 1"),
    ("harmonica", {"logits": ONES}, r"logits of blocks are \(2, 6\); allowed: \(6, 2, 2\), .*attn, mlp"),
    ("harmonica", {"logits": {"block": ONES}}, "no logits for the stage blocks"),
    ("harmonica", {"logits": {"blocks": np.ones((E, 2, 2)), "more": ONES}}, "no stage 'more' in this model"),
    ("pab", {"ranges": {"attn": 0}}, "range of attn is 0; allowed: 1 or more"),
    ("pab", {"ranges": {"cross": 6}}, "no branch 'cross' in this model; allowed: attn, mlp"),
    ("pab", {"window": (800.0, 100.0)}, "allowed: low < high"),
    ("pab", {"window": (0.1, 0.9)}, r"window=\(0.1, 0.9\) holds none of the run's times, 0 to 999"),
    ("pab", {"mlp": (700,), "mlp_skip": -1}, "mlp_skip=-1"),
    ("pab", {"mlp": (1e12,)}, r"mlp has 1e\+12, which is none of the run's times, 0 to 999"),
    # types are held also where a factory is called directly
    ("pab", {"ranges": {"attn": 1.5}}, "pab: ranges={'attn': 1.5}; allowed: a mapping of names to integers, or none"),
    ("pab", {"window": (0.0, float("nan"))}, "pab: window=.*nan"),
    ("pab", {"window": (1.0, 2.0, 3.0)}, "pab: window=.*allowed: a list of 2 numbers"),
    ("pab", {"mlp": (float("nan"),)}, r"pab: mlp=\(nan,\); allowed: a list of numbers"),
    ("frdiff", {"keyframes": (0, float("nan"))}, r"frdiff: keyframes=\(0, nan\); allowed: a list of integers"),
    ("frdiff", {"branches": (float("nan"),)}, r"frdiff: branches=\(nan,\); allowed: a list of texts"),
    ("adacache", {"codebook": ((0.1, 1.5), (1.0, 1))}, "adacache: codebook=.*1.5"),
    ("adacache", {"codebook": ((np.inf, 1), (np.inf, 2))}, "adacache: codebook=.*increasing bounds.*above 0"),
    ("adacache", {"codebook": ((-1.0, 3), (1.0, 2))}, "adacache: codebook=.*increasing bounds.*above 0"),
    ("attention_map", {"schedule": "101010"}, "attention_map: schedule='101010'; allowed: a list of integers"),
    ("tokencache", {"intervals": (2, 1.5)}, "tokencache: intervals=.*1.5"),
    ("magcache", {"ratios": [1.0], "file": True}, "magcache: file=True; allowed: a text"),
    ("teacache", {"threshold": True}, "teacache: threshold=True; allowed: a number"),
    ("delta_dit", {"interval": 0}, "interval=0; allowed: 1 or more"),
    ("delta_dit", {"cutoff": -1}, "cutoff=-1; allowed: 0 or more"),
    ("delta_dit", {"blocks": 3}, "blocks=3; allowed: up to the 2 of the model"),
    ("magcache", {}, "nothing was given; allowed: the model's ratios .*difax calibrate --cache magcache"),
    ("magcache", {"ratios": "flax"}, "ratios='flax'; allowed: numbers, or flux"),
    ("magcache", {"ratios": [1.0, -1.0]}, "ratios must be positive numbers"),
    ("magcache", {"ratios": [1.0, float("nan")]}, "ratios must be positive numbers"),
    ("magcache", {"ratios": [[1.0, 1.0], [1.0]]}, "ratios must be positive numbers"),
    ("magcache", {"ratios": [[1.0, 1.0]] * 3}, "ratios must be positive numbers"),
    ("magcache", {"ratios": []}, "ratios must be positive numbers"),
    ("magcache", {"ratios": [1.0] * 3, "halves": 2}, "halves=2 with 3 ratios; allowed: an even number"),
    ("magcache", {"ratios": [[1.0], [1.0]], "halves": 1}, "halves=1 with two lists"),
    ("magcache", {"ratios": "flux", "halves": 2}, "halves=2 with ratios='flux'; allowed: 1"),
    ("magcache", {"ratios": [1.0], "halves": 3}, "halves=3; allowed: 1, 2"),
    ("teacache", {"coefficients": ()}, r"coefficients, highest power first: \(\); allowed: a list of one or more"),
    ("teacache", {"coefficients": (1.0, float("inf"))}, "inf at 1; allowed: finite"),
    ("smoothcache", {"errors": {}}, "an empty table"),
    ("smoothcache", {"errors": [0.1] * E}, r"allowed: \{branch: numbers\}"),
    ("smoothcache", {"errors": {"attn": [[]] * E}}, "blocks.attn are 6 x 0; allowed: 6 x any"),
    ("smoothcache", {"errors": {"attn": [[float("inf")]] * E}}, r"inf at \[0, 0\]; allowed: finite numbers of 0"),
    ("smoothcache", {"errors": {"attn": [[-0.1]] * E}}, r"-0.1 at \[0, 0\]; allowed: finite numbers of 0"),
    ("smoothcache", {"errors": {"attn": [[None]] * E}}, "numbers of blocks.attn are null"),
    ("smoothcache", {"schedule": {}}, "an empty schedule"),
    ("smoothcache", {"schedule": {"attn": [[1, 0], [1]]}}, "allowed: 1 and 0"),
    ("block_caching", {"changes": {"attn": [[None] * E] * 2}}, r"nan at \[0, 1\]; allowed: finite"),
    ("block_caching", {"changes": {"attn": -ONES}}, "allowed: finite numbers of 0 or more"),
    ("bacache", {"similarities": {"attn": np.full((2, E, E), np.nan)}, "bubble": 0, "updates": 2}, "nan at .*of -1"),
    (
        "bacache",
        {"similarities": {"attn": np.ones((2, E, E))}, "spreads": {"attn": [1.0]}, "updates": 2},
        "blocks.attn are 1; allowed: 2",
    ),
    ("scheduled", {"schedule": []}, "allowed: a list of 1 .* and 0"),
    ("scheduled", {"schedule": [[1, 0]] * E}, "allowed: a list of 1 .* and 0"),
    ("harmonica", {"logits": np.full((E, 2, 2), np.nan)}, "logits of blocks has numbers that are not finite"),
    ("lazydit", {"weights": {}}, "lazydit: weights: .*none of them empty"),
    ("lazydit", {"weights": {"blocks": {"attn": np.full((2, E, 16), np.inf)}}}, "blocks.attn has numbers that are not"),
    ("fastcache", {"weights": {"blocks": {"weight": [[1.0], [1.0, 2.0]]}}}, "allowed: an array of numbers"),
    ("icc", {"factors": {"blocks": ONES}}, "icc: factors: .*allowed: {stage: {name: array}}"),
    ("tokencache", {"importance": [1.0, float("nan")], "blocks": 0.5}, "importance: nan at 1; allowed: finite"),
    ("magcache", {"ratios": [1.0], "retention": 1.5}, "retention=1.5; allowed: .* 0 to 1"),
    ("ab_cache", {"order": 0}, "order=0, interval=3, first=0; allowed: 1 or more"),
    ("ab_cache", {"where": "block"}, "where='block'; allowed: branches, output"),
    ("frdiff", {"interval": 0}, "interval=0; allowed: 1 or more"),
    ("frdiff", {"keyframes": (0, 9)}, "keyframe 9; allowed: up to 5"),
    ("frdiff", {"branches": ("cross",)}, "no branch 'cross' in this model; allowed: attn, mlp"),
    ("block_caching", {}, "nothing was given; allowed: changes, or a file"),
    ("block_caching", {"changes": {"attn": np.ones((2, 5))}}, "blocks.attn are 2 x 5; allowed: 2 x 6"),
    ("block_caching", {"changes": {}, "adjust": "nowhere.npz"}, "adjust='nowhere.npz'; allowed: an .npz file"),
    ("bacache", {}, "nothing was given; allowed: similarities, or a file"),
    ("bacache", {"similarities": {"attn": np.ones((2, E, E))}}, "bubble=3 needs spreads; allowed without: 0"),
    ("bacache", {"similarities": {}, "bubble": 0, "updates": 7}, "updates=7; allowed: up to the 6 evaluations"),
    ("attention_map", {"reuse": -1}, "reuse=-1"),
    ("attention_map", {"schedule": (1, 0)}, "2 entries in the schedule; the run has 6"),
    ("attention_map", {"branches": ("cross",)}, "no branch 'cross' in this model; allowed: attn, mlp"),
]


@pytest.mark.parametrize("name, settings, message", REFUSED, ids=[name for name, *_ in REFUSED])
def test_refused_with_what_is_allowed(name, settings, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        rows(CACHES[name](**settings), tiny_dit()[0].stages, steps=E)


@pytest.mark.parametrize("arguments", [((2,), None), ((2,), (1,), 4), (None, None, 5), (None, None, 28, "slowest"), ()])
def test_steps_mask_refuses(arguments):
    with pytest.raises(ValueError, match="steps_mask: .*(allowed|has a mask for)"):
        steps_mask(*arguments)


def test_attention_map_refuses_a_branch_that_does_not_attend():
    with pytest.raises(ValueError, match="mlp of blocks does not attend; allowed: attn"):
        problem().run(CACHES["attention_map"](branches=("mlp",)))


def test_adjustments_of_another_run_are_refused(tmp_path):
    file = str(tmp_path / "adjust.npz")
    for arrays, message in [
        ({"blocks.attn.scale": np.ones((2, 5, 1))}, r"blocks.attn.scale is \(2, 5, 1\); allowed: \(2, 6, channels\)"),
        ({"blocks.attn.scale": np.ones((2, E, 1))}, "adjustment of blocks.attn has no shift"),
        ({"blocks.cross.scale": np.ones((2, E, 1))}, "no branch of blocks 'cross'"),
    ]:
        np.savez(file, **arrays)
        with pytest.raises(ValueError, match=message):
            rows(block_caching({"attn": ONES}, adjust=file), tiny_dit()[0].stages, steps=E)
