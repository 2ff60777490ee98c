"""What belongs together in the tests, and the seconds that a run took for it: each family has a budget in the default
run, so that a family that joins does not make every run longer than a person waits."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

BUDGET = 45.0  # seconds of the default run, of one core, on two cores without AVX-512

# file of tests, or the folder of docstring examples -> family
FAMILIES = {
    "core": ("process", "ops", "sampler", "cost", "conditioning"),
    "solvers": ("solvers", "drive"),
    "solvers: k-diffusion": ("solvers_kdiffusion",),
    "schedulers": ("schedulers",),
    "solvers: exponential": ("solvers_exponential",),
    "solvers: adams": ("solvers_adams",),
    "solvers: learned": ("learned_solvers",),
    "solvers: parallel in time": ("parallel_time",),
    "solvers: augmented": ("augmented",),
    "execution": ("executed", "composition"),
    "64 bits": ("bits",),
    "autoencoders": ("autoencoders",),
    "caches: contract": ("caches", "caches_rules"),
    "caches: promises": ("batches", "finite"),
    "caches: engine": ("cache_engine",),
    "caches: plans": ("caches_plans", "skip_dit"),
    "caches: gates": ("caches_online",),
    "caches: tokens": ("caches_tokens",),
    "attention": ("attention",),
    "block lists": ("block_sparse",),
    "kernels: TPU": ("tpu_attention",),
    "kernels: GPU": ("triton_attention", "mosaic_attention"),
    "meshes": ("meshes",),
    "quantisation": ("qtensor", "products"),
    "autoencoders: video": ("wan_autoencoder",),
    "models: qwen_image": ("qwen_image_parity",),
    "models: flux2": ("flux2_parity",),
    "guidance": ("guidance",),
    "models: z_image": ("z_image_parity",),
    "models: folders": ("model_folders", "experts", "wan_image"),
    "models": ("dit_parity", "flux_parity", "pixart_parity", "wan_parity", "conditions", "sizes"),
    "encoders": ("encoders",),
    "models: sd3": ("sd3_parity",),
    "pipelines: study": ("pipelines_study",),
    "weights": ("safetensors", "opened", "config_json"),
    "conversion": ("convert",),
    "pipelines: refused": ("pipelines_refused", "pipelines_single"),
    "pipelines: image in": ("image_in",),
    "pipelines": ("pipelines",),
    "prompts": ("tokenizers", "prompts", "published"),
    "training": ("train", "losses", "data", "classifier"),
    "calibration": ("fit",),
    "grids": ("grids", "grid_fits"),
    "media": ("media",),
    "files": ("files", "fuzz_files"),
    "study": ("metrics", "networks", "pareto", "pareto_report", "pareto_search", "profile", "experiments", "peers"),
    "plans": ("plan",),
    "front door": ("run", "outside", "readme", "colab"),
    "commands": ("cli", "catalogue", "interrupts"),
    "settings": ("fuzz_settings", "settings"),
    "packaging": ("packaging",),
    "hosts": ("hosts",),
    "start": ("executables",),
}


# files that take longest, which are begun first
LONGEST = (
    "caches", "cache_engine", "train", "caches_tokens", "composition", "run", "caches_online", "outside", "data",
    "executed", "colab", "attention", "sampler", "conditioning",
)  # fmt: skip


def some(values: Iterable[Any], *every_run: Any) -> list[Any]:
    """Values of a table of tests, of which every run has those that are named; the others are slow."""
    slow = pytest.mark.slow
    return [value if value in every_run else pytest.param(value, marks=slow) for value in values]


def family(nodeid: str) -> str:
    """The family of a test; a file that is in none is one of its own."""
    path = nodeid.split("::")[0]
    stem = path.rpartition("/")[2].removesuffix(".py").removeprefix("test_")
    if "test_" not in path:
        return "docstrings"
    return next((name for name, stems in FAMILIES.items() if stem in stems), stem)


def table(seconds: Counter[str], tests: Counter[str]) -> list[str]:
    """Lines of the seconds and tests of each family, the longest first, those over the budget named."""
    lines = [f"{'family':<20} {'tests':>6} {'seconds':>8}   (budget of a family: {BUDGET:.0f} s of the default run)"]
    for name, spent in seconds.most_common():
        over = "   over its budget" if spent > BUDGET else ""
        lines.append(f"{name:<20} {tests[name]:>6} {spent:>8.1f}{over}")
    return [*lines, f"{'all':<20} {sum(tests.values()):>6} {sum(seconds.values()):>8.1f}"]
