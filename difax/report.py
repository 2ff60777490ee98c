"""What the command line shows: the table of a run's cost, and listings of what there is."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from difax.checkpoints import embedded_weights
from difax.config import config_names, load_config
from difax.core.cost import model_cost
from difax.models.autoencoders import AUTOENCODERS
from difax.models.encoders import ENCODERS
from difax.pipelines.recipes import RECIPES
from difax.program import model_shapes, parameter_count
from difax.registry import REGISTRIES, make

# the configuration whose size `difax list models` states
NATIVE = {
    "dit": "dit_imagenet",
    "skip_dit": "skip_dit_imagenet",
    "flux": "flux_dev",
    "pixart": "pixart_sigma",
    "wan": "wan2_1",
    "sd3": "sd3",
    "qwen_image": "qwen_image",
    "flux2": "flux2_klein",
    "z_image": "z_image",
}

_ROWS = {
    "model": "model",
    "weights": "weights",
    "solver": "solver",
    "guide": "guidance",
    "cache": "cache",
    "attend": "attention",
    "quant": "quantisation",
    "dtype": "dtype",
    "images": "images",
    "not_finite": "images that are not finite",
    "unfinished": "share of images that are not finished",
    "steps": "steps",
    "evaluations": "evaluations",
    "most_evaluations": "evaluations at most",
    "batches": "batches of evaluations",
    "network_evaluations": "network evaluations per image",
    "computed_fraction": "fraction of branches computed",
    "decisions": "computed (F), filled (.)",
    "hit_rate": "evaluations that filled something",
    "metric": "the gate's metric",
    "gflops_per_image": "GFLOPs per image",
    "attended_by": "attention that served",
    "multiplied_by": "products of quantised weights",
    "weights_mib": "weights (MiB)",
    "program": "program was",
    "published": "published numbers",
    "encode_seconds": "seconds of encoding the prompts",
    "image_seconds": "seconds of encoding the image",
    "decode_seconds": "seconds of decoding the pictures",
    "compile_seconds": "compile seconds",
    "seconds_per_image": "seconds per image",
    "peak_memory_mib": "peak memory (MiB)",
    "device": "device",
    "jax": "jax",
    "pictures": "pictures show",
    "out": "written to",
}


def format_table(table: dict[str, Any]) -> str:
    """The table of `difax sample` for people."""
    width = max(map(len, _ROWS.values()))
    lines = [f"{_ROWS[k]:<{width}}  {_shown(v)}" for k, v in table.items() if k in _ROWS and v is not None]
    if "full_size" in table:
        lines += ["", "compiled only, at full size:"]
        lines += [f"{_ROWS.get(k, k.replace('_', ' ')):<{width}}  {v}" for k, v in table["full_size"].items()]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v:.3g}" for k, v in value.items())
    if isinstance(value, list):
        return value[0] if len(set(value)) == 1 else " | ".join(value)
    return str(value)


def listing(kind: str) -> list[tuple[str, str]]:
    """(name, one line) of everything of a kind, the line being the first sentence of its docstring."""
    singular = {"processes": "process", "data": "data", "losses": "loss"}.get(kind, kind.removesuffix("s"))
    if kind == "configs":
        return [(name, _first_line(_config_doc(name))) for name in config_names()]
    if kind == "weights":
        return [(name, f"weights embedded in difax: {name}") for name in embedded_weights()]
    if kind == "pipelines":
        return [(name, _pipeline(name)) for name in RECIPES]
    if kind == "encoders":
        return [(name, _first_line(inspect.getdoc(find) or "")) for name, find in ENCODERS.items()]
    if kind == "autoencoders":
        return [(name, _first_line(inspect.getdoc(known.find) or "")) for name, known in AUTOENCODERS.items()]
    lines = [(name, _first_line(inspect.getdoc(f) or "")) for name, f in REGISTRIES[singular].items()]
    return [(n, f"{line}{_size(n)}") for n, line in lines] if kind == "models" else lines


def _pipeline(name: str) -> str:
    """What a pipeline makes of what, by which model, and the values that it takes where none are given."""
    recipe = RECIPES[name]
    given = f"prompts of up to {recipe.prompts} tokens" if recipe.prompts else "labels"
    made = f"films of {recipe.frames} frames" if recipe.frames else "pictures"
    guided = f"guidance {recipe.scale if recipe.guidance is None else recipe.guidance:g}"
    return f"{made} of {given} by {recipe.model}; {recipe.steps} steps, {guided}"


def _size(name: str) -> str:
    """Parameters, and operations of one evaluation, of a model's native size."""
    config = NATIVE.get(name)
    if config is None:
        return ""
    model = make("model", load_config(config)["model"])
    gflops = model_cost(model, model_shapes(model)).evaluation / 1e9
    return f" [{config}: {parameter_count(model) / 1e6:,.0f} M parameters, {gflops:,.0f} GFLOPs a step]"


def _config_doc(name: str) -> str:
    load_config(name)
    return importlib.import_module(f"difax.configs.{name}").__doc__ or ""


def _first_line(doc: str) -> str:
    return doc.strip().split("\n\n")[0].replace("\n", " ")
