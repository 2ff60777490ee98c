"""The studies run, at toy size, and their rows say where they come from."""

import argparse
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from difax.accel.caches.masks import steps_mask
from difax.build import build_setup, load_weights
from difax.config import load_config, override
from difax.core.cost import model_cost
from difax.core.files import read_rows
from difax.models.dit import dit
from difax.study.profile import ceiling
from experiments import gpu_kernels, gpu_suite, gpu_wheels, realised, search
from experiments.bench_step import bench
from experiments.gpu_page import milliseconds, page
from experiments.gpu_rows import Bench, Variant
from experiments.provenance import RESULTS, append_row, provenance

ROOT = pathlib.Path(__file__).resolve().parent.parent


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


def test_suite_lists_its_parts(capsys):
    gpu_suite.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(gpu_suite.PARTS)


# what stands in for a part of the suite: each does what a GPU may do to one
FAKE_PART = """
import argparse, json, os, pathlib, signal, subprocess, sys, time
from experiments.bounded import end_with_parent

end_with_parent()
parser = argparse.ArgumentParser()
parser.add_argument("part")
for name in ("--out", "--seconds", "--run", "--command"):
    parser.add_argument(name)
options = parser.parse_args()
path = pathlib.Path(options.out) / "rows.jsonl"


def rows():
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def begin(label):
    "Whether this is still to be measured."
    print(f"> {label}", flush=True)
    return not any((r["part"], r["label"]) == (options.part, label) for r in rows())


def write(label):
    row = {"part": options.part, "label": label, "us": 1.0, "run": options.run, "provenance": {"pid": os.getpid()}}
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\\n")


if begin("first"):
    write("first")
if options.part == "kernels" and begin("dies"):
    os.kill(os.getpid(), signal.SIGKILL)
if options.part == "products" and begin("hangs"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (pathlib.Path(options.out) / "child").write_text(str(child.pid))
    time.sleep(600)
if options.part == "models":
    while True:  # says something, and never comes to an end
        print("busy", flush=True)
        time.sleep(0.05)
if options.part == "realised":
    raise RuntimeError("outside of any variant")
if begin("last"):
    write("last")
"""


@pytest.fixture
def fake_parts(tmp_path, monkeypatch):
    (tmp_path / "fake_gpu_parts.py").write_text(FAKE_PART)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(gpu_suite, "PARTS", {n: p._replace(stall=1.0) for n, p in gpu_suite.PARTS.items()})
    return ["--module", "fake_gpu_parts", "--out", str(tmp_path / "out")]


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def suite_rows(tmp_path):
    return {(r["part"], r["label"]): r for r in read_rows(tmp_path / "out" / "rows.jsonl")}


@pytest.mark.parametrize(
    "part, outcome, labels",
    [
        ("ceilings", "done", {"first", "last"}),
        ("kernels", "done", {"first", "dies", "last"}),  # it was started again behind the one that killed it
        ("products", "done", {"first", "hangs", "last"}),
        ("models", "bound", {"first"}),
        ("realised", "exit code 1", {"first"}),  # and not again and again
    ],
)
def test_suite_survives_what_its_parts_do(part, outcome, labels, tmp_path, fake_parts, capsys):
    start = time.monotonic()
    gpu_suite.main([*fake_parts, "--part", part, "--budget", "8" if part == "products" else "2"])
    assert time.monotonic() - start < 10
    rows = suite_rows(tmp_path)
    assert {label for _, label in rows} == labels | {"part"}
    assert rows[part, "part"]["outcome"].startswith(outcome)
    if outcome == "done" and part != "ceilings":
        row = rows[part, {"kernels": "dies", "products": "hangs"}[part]]
        assert ("exit code -9" if part == "kernels" else "silent for 1 s") in row["error"]
        assert row["provenance"]["command"].startswith("python -m experiments.gpu_suite --module")
    if part == "products":
        assert not alive((tmp_path / "out" / "child").read_text())
    assert capsys.readouterr().out.splitlines()[-1].startswith(part)  # the table comes last


def test_suite_run_again_measures_what_is_missing(tmp_path, fake_parts, capsys):
    for _ in range(2):
        gpu_suite.main([*fake_parts, "--part", "ceilings", "--part", "models", "--budget", "1.5"])
    assert "== ceilings: done already" in capsys.readouterr().out
    lines = read_rows(tmp_path / "out" / "rows.jsonl")
    assert sum(r["label"] == "first" for r in lines) == 2  # one of each part, though `models` was begun twice
    assert [r["outcome"] for r in lines if r["label"] == "part"] == ["done", "bound", "bound"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_suite_that_is_killed_leaves_whole_rows_and_no_part(number, tmp_path, fake_parts):
    command = [sys.executable, "-m", "experiments.gpu_suite", *fake_parts, "--part", "ceilings", "--part", "models"]
    process = subprocess.Popen([*command, "--budget", "100"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("busy"):
        assert process.poll() is None
    process.send_signal(number)
    rest = process.communicate(timeout=30)[0]
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert ("ceilings" in rest) == (number == signal.SIGTERM)  # the table, where there was time for one
    rows = suite_rows(tmp_path)
    assert {("ceilings", "first"), ("ceilings", "last"), ("models", "first")} <= rows.keys()
    pid = rows["models", "first"]["provenance"]["pid"]
    for _ in range(100):
        if not alive(pid):
            break
        time.sleep(0.05)
    assert not alive(pid)


def test_group_measures_checks_and_goes_on_behind_an_error(tmp_path):
    import jax.numpy as jnp

    def raises():
        raise ValueError("no kernel " + "x" * 400)

    x = jnp.ones((8, 8))
    bench = Bench("kernels", tmp_path, 60, "run 1", "a command", True)
    variants = {
        "slow": lambda: Variant(
            lambda x: x @ x, (x,), operations=1024.0, check=lambda y: {"error_of_o": float(y[0, 0])}
        ),
        "raises": raises,
        "told": lambda: Variant(run=lambda: 0.5),
    }
    seconds = bench.group("a group", variants, baseline="slow", repeats=3)
    rows = bench.rows()
    assert rows["slow"]["error_of_o"] == 8 and rows["slow"]["us"] == pytest.approx(1e6 * seconds["slow"])
    assert rows["slow"]["tflops"] == pytest.approx(1024 / seconds["slow"] / 1e12)
    assert rows["told"]["over_baseline"] == pytest.approx(seconds["slow"] / 0.5) and rows["told"]["spread"] == 1
    assert rows["raises"]["error"].startswith("ValueError: no kernel") and len(rows["raises"]["error"]) == 300
    assert rows["slow"]["provenance"]["command"] == "a command" and rows["slow"]["provenance"]["versions"]["jax"]
    assert not any(map(bench.missing, variants))
    later = Bench("kernels", tmp_path, 60, "run 2", "a command", True)
    assert [label for label in variants if later.missing(label)] == ["raises"]
    later.group("a group", {**variants, "raises": lambda: Variant(run=lambda: 1.0)}, baseline="slow", repeats=1)
    assert later.rows()["raises"]["us"] == 1e6 and len(read_rows(tmp_path / "rows.jsonl")) == 4
    late = Bench("kernels", tmp_path, 0.5, "run 3", "a command", False)
    assert late.group("another", {"other": lambda: Variant(run=lambda: 1.0)}) == {} and not late.complete


def test_lists_of_the_suite_and_their_count():
    call = gpu_kernels.Call(0, (1, 256, 2, 64), 256, 0.5, vary=False)
    assert call.operations == 4 * 256 * 256 * 2 * 64 * 0.5
    assert (np.asarray(call.blocks.indices[..., 0]) == np.arange(2)).all()  # the query's own block is listed
    o, lse = call.expected()
    assert o.shape == (1, 256, 2, 64) and lse.shape == (1, 2, 256)
    assert call.errors("bf16", (o, lse)) == {
        "error_of_o": 0, "limit": 5e-3, "right": True, "largest_error_of_lse": 0,
    }  # fmt: skip
    assert not call.errors("bf16", (o * 1.1, lse))["right"]


def test_page_of_the_suite_has_every_row_and_its_source():
    text = page(RESULTS / "gpu")
    for row in read_rows(RESULTS / "gpu" / "prototypes.jsonl"):
        assert f"| {row['label']} | {milliseconds(row['us'])} |" in text
    assert "NVIDIA H100 80GB HBM3" in text and "580.159.04" in text
    assert (RESULTS / "gpu" / "README.md").read_text() == text


@pytest.mark.slow
def test_suite_rehearses_every_part(tmp_path, user_env):
    command = [sys.executable, "-m", "experiments.gpu_suite", "--rehearse", "--out", str(tmp_path), "--budget", "600"]
    subprocess.run(command, env=user_env, check=True)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert {r["part"]: r["outcome"] for r in rows if r["label"] == "part"} == dict.fromkeys(gpu_suite.PARTS, "done")
    raised = {r["label"]: r["error"] for r in rows if "error" in r}
    assert all("torch" in label for label in raised), raised
    assert all(r["right"] for r in rows if "right" in r)
    assert all(r["provenance"]["device"].startswith("cpu") for r in rows if r["label"] != "part")


def test_wheels_are_named_exactly():
    words = gpu_wheels.command(pathlib.Path("folder"))
    assert all("==" in wheel for wheel in gpu_wheels.WHEELS) and words[-len(gpu_wheels.WHEELS) :] == [
        *gpu_wheels.WHEELS
    ]
    assert {"--no-deps", "--only-binary=:all:", "3.12", "folder"} <= set(words)


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
