"""The search for a composition, on a made-up world in which the best one is known; and once on the real one."""

import json
from types import SimpleNamespace

import pytest

from difax.cli import main
from difax.study import pareto_search
from difax.study.methods import chosen
from difax.study.pareto import Options
from difax.study.pareto_search import Goal, name_of, score, search

pytest.importorskip("optuna")
STEPS = 50


def measured(settings, seeds):
    """A world in which FORA with interval 3 costs half as much quality as leaving steps out."""
    speed = STEPS / settings["steps"] * {"heun": 0.5}.get(settings["solver.name"], 1.0)
    loss = 3.0 * (STEPS / settings["steps"]) ** 0.5
    if settings.get("cache.name") == "fora":
        speed *= settings["cache.interval"]
        loss += 0.5 * settings["cache.interval"]
    quality = 50.0 - loss + 1e-3 * seeds
    return {"speed": {"ratio": speed}, "quality": {"psnr": [quality] * 3, "frechet": [loss] * 3}, "command": "difax"}


class World:
    """What `search` needs of a sweep; it remembers how often each setting was measured."""

    def __init__(self, options=None, seen=None):
        self.options = options or Options(seeds=54)
        self.seen = {} if seen is None else seen
        self.run = SimpleNamespace(config={"steps": STEPS, "guide": {"name": "cfg"}})
        self.tell = lambda text: None
        self.failed = {}

    def measure(self, methods):
        for name, method in methods.items():
            self.seen.setdefault(self.options.seeds, {}).setdefault(name, []).append(method.settings)
            if self.fails(method.settings):
                self.failed[name] = "RuntimeError: out of memory"
        return [
            {"method": n, **measured(m.settings, self.options.seeds)}
            for n, m in methods.items()
            if n not in self.failed
        ]

    @staticmethod
    def fails(settings):
        return False

    def qualities(self):
        return ("psnr", "frechet")


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setattr(
        pareto_search, "_rung", lambda sweep, seeds: World(sweep.options._replace(seeds=seeds), seen=sweep.seen)
    )
    return World()


@pytest.mark.parametrize("goal", [Goal(speedup=4.0), Goal(floor=42.0), Goal("frechet", floor=8.0)])
def test_the_goal_is_met_and_little_is_lost(world, goal):
    rows = search(world, goal, trials=60)
    best = rows[0]
    assert score(best, goal).short <= 0
    if goal.speedup:
        assert best["quality"]["psnr"][0] > 44 and best["speed"]["ratio"] >= 4
    else:
        assert best["speed"]["ratio"] > 4
    # by halving: all on the fewest images, a third on more, three of them on all
    assert {seeds: len(names) for seeds, names in world.seen.items()}.keys() == {8, 18, 54}
    assert len(world.seen[8]) > len(world.seen[18]) > len(world.seen[54]) == 3


def test_a_search_proposes_the_same_again(world):
    first = [r["method"] for r in search(world, Goal(speedup=4.0), trials=12)]
    names = set(world.seen[8])
    assert [r["method"] for r in search(world, Goal(speedup=4.0), trials=12)] == first and set(world.seen[8]) == names


def test_settings_that_fail_miss_every_goal(world, monkeypatch):
    monkeypatch.setattr(World, "fails", staticmethod(lambda settings: settings["solver.name"] != "euler"))
    rows = search(world, Goal(speedup=4.0), trials=12)
    assert any(not name.startswith("solver.name=euler,") for name in world.seen[8])
    assert rows and all(row["method"].startswith("solver.name=euler,") for row in rows)


def test_a_name_is_what_methods_take():
    settings = {"solver.name": "heun", "steps": 12, "cache.name": "fora", "cache.interval": 3}
    from difax.config import parse_value

    ((name, method),) = chosen([name_of(settings)], parse_value).items()
    assert method.settings == settings and name == name_of(settings)


def test_scores():
    row = {"method": "x", **measured({"steps": 25, "solver.name": "euler"}, 0)}
    assert score(row, Goal(speedup=3.0)).short == pytest.approx(1.0)
    assert score(row, Goal(floor=40.0)) == (2.0, pytest.approx(40 - 50 + 3 * 2**0.5))
    assert score({"method": "x", "refused": "why"}, Goal(speedup=3.0)).short > 1e6
    row["quality"]["psnr"] = [None] * 3
    assert score(row, Goal(speedup=1.0)).value < -1e6


def test_a_goal_has_one_bound(world):
    for goal in (Goal(), Goal(speedup=2.0, floor=30.0)):
        with pytest.raises(ValueError, match="one of --speedup and --floor"):
            search(world, goal)


@pytest.mark.slow
def test_search_on_the_shipped_model(tmp_path, capsys):
    arguments = [
        "pareto",
        "--search",
        "--speedup",
        "2",
        "--trials",
        "4",
        "--seeds",
        "4",
        "--batch",
        "4",
        "--turns",
        "1",
    ]
    arguments += ["--no-judge", "--config.steps=8", "--quiet", "--out", str(tmp_path / "p"), "--json"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    rows = json.loads(text.splitlines()[-1])
    assert rows[0]["method"] == "baseline" and len(rows) >= 2 and "difax sample --config" in text
    before = (tmp_path / "p" / "search" / "4" / "rows.jsonl").read_text()
    assert main(arguments) == 0
    assert (tmp_path / "p" / "search" / "4" / "rows.jsonl").read_text() == before
