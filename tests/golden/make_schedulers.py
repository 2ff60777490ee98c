"""Writes schedulers.npz: trajectories of diffusers' schedulers on the Gaussian mixture, one for each scheduler file of
schedulers_cases.py.

`defaults` is a JSON text: of every class of schedulers, its keys with their defaults. The network is the mixture's
exact one (tests/oracles/schedulers.py) at the time that the scheduler tells it, in float64 and rounded to float32. Per
case: `told` [E]; `path` [E + 1, 4, 8], what the network is given at each evaluation, and the final sample; `prior`,
what unit noise was multiplied by to become the first input; `noise` [E, 4, 8], the draw that an evaluation's step used,
where there is any.

Needs torch 2.13, diffusers 0.42.1, torchsde and scipy, no accelerator:

  python -m tests.golden.make_schedulers
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SHAPE = (4, 8, 1)


def defaults(diffusers: Any) -> dict[str, dict[str, Any]]:
    """{class: {key: default}} of all schedulers; None where there is no default."""
    found = {}
    for name in sorted(dir(diffusers.schedulers)):
        made = getattr(diffusers.schedulers, name)
        if isinstance(made, type) and name.endswith("Scheduler"):
            parameters = list(inspect.signature(made.__init__).parameters.values())[1:]
            found[name] = {p.name: None if p.default is p.empty else p.default for p in parameters}
    return found


def main() -> None:
    import diffusers as D
    import torch

    from tests.golden.schedulers_cases import CALL, CASES, MU, PIPELINE
    from tests.oracles.schedulers import network

    files: dict[str, np.ndarray] = {}

    def motion(draw):
        """Increments of one Brownian motion over sigma, of unit variance: two that start together share the shorter."""
        before: list[Any] = []

        def sampler(start, end):
            z = draw()
            if before and before[0] == start:
                c = ((start - before[1]) / (start - end)) ** 0.5
                z = c * before[2] + (1 - c**2) ** 0.5 * z
            before[:] = start, end, z
            return z

        return sampler

    for at, (name, (cls, config, n)) in enumerate(CASES.items()):
        rng = np.random.default_rng(1000 + at)
        made = getattr(D, cls)
        module: Any = importlib.import_module(made.__module__)
        drawn: list[np.ndarray] = []

        def draw(*_, rng=rng, drawn=drawn, **__) -> torch.Tensor:
            drawn.append(rng.normal(size=SHAPE).astype(np.float32))
            return torch.from_numpy(drawn[-1])

        if hasattr(module, "randn_tensor"):
            module.randn_tensor = draw
        if hasattr(module, "BrownianTreeNoiseSampler"):
            module.BrownianTreeNoiseSampler = lambda *a, draw=draw, **b: motion(draw)
        scheduler = made(**config)
        if config.get("use_dynamic_shifting") or name in PIPELINE:
            mu = dict(mu=MU) if config.get("use_dynamic_shifting") else {}
            scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n), **mu)
        else:
            scheduler.set_timesteps(n)
        if hasattr(scheduler, "set_begin_index"):  # else a first time that is told twice is taken for its second
            scheduler.set_begin_index(0)
        takes = inspect.signature(scheduler.step).parameters
        more = dict(CALL.get(name, {}))
        first = rng.normal(size=SHAPE)
        x = torch.from_numpy((first * float(getattr(scheduler, "init_noise_sigma", 1.0))).astype(np.float32))
        told, path, noise = [], [], []
        before, last = None, None
        times = list(scheduler.timesteps)
        for i, now in enumerate(times):
            given = scheduler.scale_model_input(x, now) if hasattr(scheduler, "scale_model_input") else x
            path.append(given.numpy())
            told.append(float(now))
            output = network(cls, config, given.double().numpy()[..., 0], float(now))
            if cls == "UnCLIPScheduler" and i + 1 < len(times):
                more.update(prev_timestep=times[i + 1])
            elif cls == "UnCLIPScheduler":
                more.update(prev_timestep=None)
            drawn.clear()
            made_of = torch.from_numpy(output.astype(np.float32)[..., None])
            given_first = (before, now, last, x) if "timestep_back" in takes else (now, x)
            stepped = scheduler.step(made_of, *given_first, return_dict=False, **more)
            x = stepped[0]
            before, last = stepped[1] if len(stepped) > 1 else None, now
            noise.append(drawn[-1] if drawn else np.zeros(SHAPE, np.float32))
        path.append(x.numpy())
        files[f"{name}.told"] = np.asarray(told)
        files[f"{name}.path"] = np.stack(path).astype(np.float32)[..., 0]
        files[f"{name}.prior"] = np.median(path[0] / first)
        if np.any(noise):
            files[f"{name}.noise"] = np.stack(noise)[..., 0]
        bad = not np.all(np.isfinite(files[f"{name}.path"]))
        print(name, len(told), "NOT FINITE" if bad else "", np.abs(files[f"{name}.path"]).max())
    files["defaults"] = np.asarray(json.dumps(defaults(D)))
    np.savez_compressed(Path(__file__).with_name("schedulers.npz"), **files)


if __name__ == "__main__":
    main()
