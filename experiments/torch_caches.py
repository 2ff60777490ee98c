"""The other side of `experiments.peers`: diffusers and cache-dit, one whole sample for each line on stdin.

python -m experiments.torch_caches GEOMETRY FOLDER

GEOMETRY is a JSON object (`experiments.peers.GEOMETRIES`, with "threads"); random weights and inputs are written to
FOLDER. A line is a JSON object {"method": ..., "loop": {"time": [E], "x": [E], "output": [E], "guide": ..., "scale":
...}, "out": FILE}: the step is x <- x_e x + output_e network(x, time_e), in plain tensors. The answer is a JSON line:
seconds, CPU seconds, and which branches of which blocks were computed, counted at their innermost forward. Needs
`parity`, and for cache-dit's methods `pip install --no-deps cache-dit==1.5.3`.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import copy
import functools
import json
import os
import sys
import time
from typing import Any

GAIN, BIAS, TABLE = 1.0, 0.05, 0.5  # of weights over 1 / sqrt(inputs), of biases, and of Wan's tables
EMBEDDER_GAIN = 0.5  # of the last layer of every embedder of time, so that one step changes little


def build(geometry: dict[str, Any]) -> Any:
    """A network of diffusers with random weights, none of them zero."""
    import diffusers
    import torch

    torch.manual_seed(geometry.get("seed", 0))
    model = getattr(diffusers, geometry["class"])(**geometry["arguments"]).eval().requires_grad_(False)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "table" in name and "embedding" not in name:
                p.normal_(0, TABLE)
            elif p.ndim > 1:
                p.normal_(0, GAIN * p[0].numel() ** -0.5)
                if "embedder.linear_2" in name:
                    p.mul_(EMBEDDER_GAIN)
            elif "norm" in name and name.endswith("weight"):
                p.normal_(1.0, 0.1)
            else:
                p.normal_(0, BIAS)
    if geometry["kind"] == "dit":
        # the embedders inside the blocks are copies of one in every published checkpoint
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return model


def inputs(geometry: dict[str, Any]) -> dict[str, Any]:
    """The initial noise x, channels first, and the condition with its unconditional half."""
    import torch

    torch.manual_seed(geometry.get("seed", 0) + 1)
    a, batch = geometry["arguments"], geometry["batch"]
    if geometry["kind"] == "dit":
        x = torch.randn(batch, a["in_channels"], a["sample_size"], a["sample_size"])
        return {"x": x, "label": torch.arange(batch) + 1, "null_label": torch.full((batch,), a["num_embeds_ada_norm"])}
    length = geometry["text_tokens"]
    if geometry["kind"] == "wan":
        text = torch.randn(2, batch, length, a["text_dim"])
        x = torch.randn(batch, a["in_channels"], *geometry["size"])
        return {"x": x, "text": text[0].clone(), "null_text": text[1].clone()}
    return {
        "x": torch.randn(batch, a["in_channels"] // 4, *geometry["size"]),
        "text": torch.randn(batch, length, a["joint_attention_dim"]),
        "pooled": torch.randn(batch, a["pooled_projection_dim"]),
        "guidance": torch.full((batch,), 3.5),
    }


def sites(kind: str, model: Any) -> list[tuple[str, Any]]:
    """The modules whose output is a residual branch, in the order in which difax reports them."""
    if kind == "dit":
        return [
            (f"{b}", m) for block in model.transformer_blocks for b, m in (("attn", block.attn1), ("mlp", block.ff))
        ]
    if kind == "wan":
        branches = ("attn1", "attn2", "ffn")
        return [(b, getattr(block, b)) for block in model.blocks for b in branches]
    double = [(b, getattr(block, b)) for block in model.transformer_blocks for b in ("attn", "ff")]
    return double + [("attn_mlp", block.proj_out) for block in model.single_transformer_blocks]


class Network:
    """A copy of the network that shares its weights, with one cache of one library put on."""

    def __init__(self, geometry: dict[str, Any], base: Any, method: dict[str, Any], steps: int, guide: str):
        shared = {id(t): t for t in [*base.parameters(), *base.buffers()]}
        self.kind = geometry["kind"]
        self.model = copy.deepcopy(base, shared)
        self.called: list[int] = []
        self.sites = sites(self.kind, self.model)
        for index, (_, module) in enumerate(self.sites):
            module.forward = self._counted(module.forward, index)
        self.now = 0.0
        library = method["library"]
        if library == "diffusers":
            self._diffusers(method["config"], dict(method["settings"]), steps)
        elif library == "cache-dit":
            self._cache_dit(method["config"], dict(method["settings"]), method.get("calibrator"), guide)
        self.contexts = library == "diffusers"

    def _counted(self, forward: Any, index: int) -> Any:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.called.append(index)
            return forward(*args, **kwargs)

        return run

    def _diffusers(self, config: str, settings: dict[str, Any], steps: int) -> None:
        import diffusers.hooks as hooks
        import torch

        if config == "FirstBlockCacheConfig":
            hooks.apply_first_block_cache(self.model, hooks.FirstBlockCacheConfig(**settings))
        elif config == "PyramidAttentionBroadcastConfig":
            made = hooks.PyramidAttentionBroadcastConfig(**settings, current_timestep_callback=lambda: self.now)
            hooks.apply_pyramid_attention_broadcast(self.model, made)
        elif config == "TaylorSeerCacheConfig":
            settings["taylor_factors_dtype"] = getattr(torch, settings["taylor_factors_dtype"])
            hooks.apply_taylorseer_cache(self.model, hooks.TaylorSeerCacheConfig(**settings))
        elif config == "MagCacheConfig":
            hooks.apply_mag_cache(self.model, hooks.MagCacheConfig(**settings, num_inference_steps=steps))
        else:
            raise ValueError(f"unknown config {config!r} of diffusers")

    def _cache_dit(self, config: str, settings: dict[str, Any], calibrator: Any, guide: str) -> None:
        import cache_dit

        made = getattr(cache_dit, config)(**settings, enable_separate_cfg=guide == "separate")
        kind = None if calibrator is None else cache_dit.TaylorSeerCalibratorConfig(**calibrator)
        cache_dit.enable_cache(self.model, cache_config=made, calibrator_config=kind)

    def __call__(self, x: Any, time_: float, cond: dict[str, Any], context: str) -> Any:
        import torch
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        if self.contexts:
            _set_cache_context(self.model, CacheContext(context))
        self.now, batch = time_, len(x)
        if self.kind == "dit":
            t = torch.full((batch,), time_)
            out = self.model(x, timestep=t, class_labels=cond["label"], return_dict=False)[0]
            return out[:, : x.shape[1]]  # behind it the variance
        if self.kind == "wan":
            t = torch.full((batch,), time_)
            return self.model(x, timestep=t, encoder_hidden_states=cond["text"], return_dict=False)[0]
        size = tuple(x.shape[2:])
        packed = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
        out = self.model(
            hidden_states=packed,
            encoder_hidden_states=cond["text"],
            pooled_projections=cond["pooled"],
            timestep=torch.full((batch,), time_ / 1000.0),
            guidance=cond["guidance"],
            img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(size[0] / 2), torch.arange(size[1] / 2)),
            txt_ids=torch.zeros(cond["text"].shape[1], 3),
            return_dict=False,
        )[0]
        return torch.nn.functional.fold(out.transpose(1, 2), size, 2, stride=2)

    def taken(self) -> list[int]:
        """1 for every branch that was computed since the last call."""
        seen = set(self.called)
        self.called.clear()
        return [int(i in seen) for i in range(len(self.sites))]


def sample(geometry: dict[str, Any], base: Any, given: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """One run of the loop; the final x goes to request["out"]."""
    import numpy as np
    import torch

    loop = request["loop"]
    guide, scale = loop["guide"], loop["scale"]
    network = Network(geometry, base, request["method"], len(loop["time"]), guide)
    on = {k: v for k, v in given.items() if k != "x" and not k.startswith("null_")}
    off = {k: given.get(f"null_{k}", v) for k, v in on.items()}
    both = {k: torch.cat([v, off[k]]) for k, v in on.items()}
    x, computed = given["x"], []
    start, start_cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for t, a, b in zip(loop["time"], loop["x"], loop["output"], strict=True):
            if guide == "none":
                out = network(x, t, on, "cond")
                computed.append([network.taken()])
            elif guide == "together":
                first, second = network(torch.cat([x, x]), t, both, "both").chunk(2)
                out = second + scale * (first - second)
                computed.append([network.taken()] * 2)
            else:
                first = network(x, t, on, "cond")
                halves = [network.taken()]
                second = network(x, t, off, "uncond")
                computed.append([*halves, network.taken()])
                out = second + scale * (first - second)
            x = a * x + b * out
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    np.save(request["out"], x.numpy())
    return {"seconds": seconds, "cpu_seconds": cpu, "computed": computed}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # the libraries print
    os.dup2(2, 1)
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    try:
        import diffusers
        import torch
        from safetensors.torch import save_file
    except ImportError as error:
        raise SystemExit(f"experiments.torch_caches needs the extra difax[parity]: {error}") from None
    diffusers.utils.logging.set_verbosity_error()
    geometry, folder = json.loads(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(geometry["threads"])
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "threads": geometry["threads"]}
    try:
        import cache_dit
    except ImportError as error:
        versions["cache-dit"] = f"none: {error}"
    else:
        versions["cache-dit"] = cache_dit.__version__
    base, given = build(geometry), inputs(geometry)
    save_file({k: v.contiguous() for k, v in base.state_dict().items()}, f"{folder}/weights.safetensors")
    save_file({k: v.contiguous() for k, v in given.items()}, f"{folder}/inputs.safetensors")
    parameters = sum(p.numel() for p in base.parameters())
    print(json.dumps({"versions": versions, "parameters": parameters}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = sample(geometry, base, given, request)
        except Exception as error:  # what a library cannot do is a result
            answer = {"error": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
