"""The studies run, at toy size, and their rows say where they come from."""

import argparse
import json
import subprocess
import sys

import numpy as np
import pytest

from difax.accel.caches.masks import steps_mask
from difax.build import build_setup, load_weights
from difax.config import load_config, override
from difax.core.cost import model_cost
from difax.core.files import read_rows
from difax.models.dit import dit
from difax.study.profile import ceiling
from experiments import gpu_suite, realised, search
from experiments.bench_step import bench
from experiments.provenance import append_row, provenance


@pytest.mark.slow
def test_bench_row_counts_its_own_work():
    row = bench("S/8", 2, "float32", 2, [], 2, top=ceiling("float32", (128,)))
    model = dit("S/8")
    import jax

    flops = 2 * model_cost(model, jax.eval_shape(model.init, jax.random.key(0))).evaluation
    assert row["gflops"] == pytest.approx(flops / 1e9)
    for layout in ("stacked", "unstacked"):
        part = row[layout]
        assert part["gflops_per_second"] == pytest.approx(row["gflops"] / part["seconds"])
        assert part["seconds_min"] <= part["seconds"] <= part["seconds_max"]
        assert part["compile_seconds"] > 0 and part["peak_memory_mib"] > 0
        assert row["sample"][layout]["compile_seconds"] > 0
    assert row["sample"]["steps"] == 2 and row["sample"]["unstacked"]["seconds"] > 0


def test_provenance_and_rows(tmp_path):
    found = provenance()
    assert {"device", "processor", "versions", "command", "date", "commit"} <= found.keys()
    assert found["device"].startswith("cpu") and found["versions"]["jax"]
    append_row(tmp_path / "new" / "rows.jsonl", {"a": 1})
    append_row(tmp_path / "new" / "rows.jsonl", {"a": 2})
    assert read_rows(tmp_path / "new" / "rows.jsonl") == [{"a": 1}, {"a": 2}]
    assert read_rows(tmp_path / "none") == []


def test_suite_lists_its_parts(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--list"])
    gpu_suite.main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(gpu_suite.PARTS)


@pytest.mark.parametrize(
    "output, finished", [("run: step 40 of 40\n", True), ("run: step 8 of 40\n", False), ("", False)]
)
def test_suite_knows_a_finished_slice(output, finished):
    assert gpu_suite._trained(output) == finished


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu_suite.PARTS)
def test_suite_part_runs(part, tmp_path, data_dir, user_env):
    command = [sys.executable, "-m", "experiments.gpu_suite", "--part", part, "--quick", "--out", str(tmp_path)]
    subprocess.run([*command, "--data", str(data_dir)], env=user_env, check=True)
    rows = [json.loads(line) for line in (tmp_path / "quick.jsonl").read_text().splitlines()]
    assert rows and all(row["exit_code"] == 0 and row["part"] == part for row in rows)


@pytest.mark.slow
def test_realised_rows_count_what_was_left_out_and_what_is_remembered():
    rows = {r["method"]: r for r in realised.measure("S/8", 1, "float32", ["fora 3", "teacache"], 6, 1)}
    # two of six evaluations are computed; what is held still pays for its conditioning and the ends
    assert 2.5 < rows["fora 3"]["flops_ratio"] < 3
    np.testing.assert_allclose(rows["fora 3"]["remembered_mib"], 12 * 2 * 2 * 16 * 384 * 4 / 2**20)
    assert rows["teacache"]["settings"]["threshold"] > 0 and 1 < rows["teacache"]["flops_ratio"] < 6
    for row in rows.values():
        assert row["realised"] == pytest.approx(row["seconds_ratio"] / row["flops_ratio"])


@pytest.mark.slow
def test_search_compares_plans_of_equal_operations():
    options = argparse.Namespace(where="branches", forecast="hold", samples=2, rounds=1, held_out=20)
    config = override(load_config("fmnist_dit"), [("steps", 8)])
    run = build_setup(config)
    params = run.prepare(load_weights(config, run.model)[1])
    rows = {r["plan"]: r for r in search.compare(run, params, "fast", options)}
    assert len({r["computed"] for r in rows.values()}) == 1 and len({r["gflops"] for r in rows.values()}) == 1
    assert rows["SCM fast"]["schedule"] == "".join(map(str, steps_mask(policy="fast", total_steps=8)))
    for row in rows.values():
        low, high = row["psnr_interval"]
        assert low <= row["psnr"] <= high and row["gain"] == pytest.approx(rows["found"]["psnr"] - row["psnr"])
