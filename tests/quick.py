"""XLA's flags for the tests: what a tiny program costs is its compilation, so it does without what makes it fast."""

import importlib.metadata

# flag: (its value in the tests, what XLA has)
FLAGS = {"xla_backend_optimization_level": (0, 3), "xla_cpu_parallel_codegen_split_count": (1, 32)}
if int(importlib.metadata.version("jaxlib").split(".")[1]) < 11:  # half of the compilation; gone from jax 0.12
    FLAGS["xla_cpu_use_fusion_emitters"] = (False, True)


def with_flags(given: str = "", **more: object) -> str:
    """XLA_FLAGS with those of the tests, and others, where they are not given already."""
    flags = {**{flag: value for flag, (value, _) in FLAGS.items()}, **more}
    wanted = [f"--{flag}={str(value).lower()}" for flag, value in flags.items() if flag not in given]
    return " ".join([given, *wanted]).strip()
