"""difax's caches decide and give out what cache-dit's and diffusers' do, on the same weights, run beside them."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from experiments.peer_settings import QUICK

TOLERANCE = 1e-4  # of the largest value; 1e-5 is measured, from the peer's own frequencies (test_flux_parity)


@pytest.mark.slow
def test_peers_decide_and_give_out_the_same(tmp_path, user_env):
    for package in ("torch", "diffusers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: difax[parity] has it")
    found, methods, path = importlib.util.find_spec("cache_dit"), QUICK, []
    if found is None or found.origin is None:
        methods = tuple(m for m in QUICK if not m.startswith("cache-dit"))
        print("cache-dit is not installed (pip install --no-deps cache-dit==1.5.3): diffusers alone is compared")
    else:
        path = ["--torch-path", str(pathlib.Path(found.origin).parent.parent)]
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "experiments.peers", "--quick", "--out", str(out), *path, "--methods", *methods]
    subprocess.run(command, env=user_env, check=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 3 * (1 + len(methods))
    for row in rows:
        print(f"{row['geometry']} {row['method']}: {row['decisions']} {row['max_rel']:.1e} of {row['effect']:.1e}")
        assert row["equal"], row
        assert row["max_rel"] < TOLERANCE
        if row["method"] != "uncached":
            # the cache did something, and much more than the sides differ by
            assert any(c != "F" for strip in row["decisions"]["difax"] for c in strip)
            assert row["effect"] > 100 * row["rel_l2"]
