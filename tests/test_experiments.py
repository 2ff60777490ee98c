"""The studies run, at toy size, and their rows say where they come from."""

import json
import subprocess
import sys

import pytest

from difax.cost import model_cost
from difax.models.dit import dit
from experiments import gpu_suite
from experiments.bench_step import bench, ceiling
from experiments.provenance import append_row, provenance, read_rows


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
