"""FLUX.2 klein and dev on latents of 1024 x 1024 pixels: rectified flow from three states of a language model.

  difax sample --config flux2_klein --weights FLUX.2-klein-4B/transformer --cond prompts.safetensors
  difax sample --config flux2_klein:base-9B --weights FLUX.2-klein-base-9B/transformer --cond prompts.safetensors
  difax sample --config flux2_klein:dev --random-init        (costs without weights)

The argument is "klein-4B" or "klein-9B", distilled to 4 steps without guidance, "base-4B" or "base-9B", the same
networks undistilled, which take 50 steps with guidance 4 towards the empty prompt, or "dev", whose guidance scale is an
input of the network (4.0 in the pipeline's defaults). Latents are [H/16, W/16, 128], behind 2 x 2 patches; decode them
with the autoencoder of the checkpoint. Times are shifted by the number of image tokens, whichever way the size is set,
and of steps, those of here: for another number of them set `process.shift` (`difax.core.process.flux2_shift`).
Black Forest Labs 2025, https://github.com/black-forest-labs/flux2.
"""

from ml_collections import ConfigDict

# argument -> variant, is it distilled, guidance by two evaluations
CASES = {
    "klein-4B": ("klein-4B", True, False),
    "klein-9B": ("klein-9B", True, False),
    "base-4B": ("klein-4B", False, True),
    "base-9B": ("klein-9B", False, True),
    "dev": ("dev", False, False),
}


def get_config(arg: str = "klein-4B") -> ConfigDict:
    """arg: "klein-4B", "klein-9B", "base-4B", "base-9B" or "dev"."""
    if arg not in CASES:
        raise ValueError(f"config flux2_klein:{arg}; allowed: {', '.join(CASES)}")
    variant, distilled, guided = CASES[arg]
    return ConfigDict(
        {
            "model": {
                "name": "flux2",
                "variant": variant,
                "size": (64, 64),
                "dtype": "bfloat16",
            },
            "process": {"name": "flow", "shift": None, "shift_by": "flux2_distilled" if distilled else "flux2"},
            "prediction": "velocity",
            "weights": None,
            # drawn with in place of the whole where that does not fit into memory (--random-init)
            "reduced": {"model": {"double_depth": 1, "single_depth": 1, "size": 16}, "steps": 4},
            "attend": {"name": "chunked"},
            "solver": {"name": "euler"},
            "grid": {"name": "flow_match", "use_dynamic_shifting": True, "sigmas": "pipeline"},
            "steps": 4 if distilled else 50,
            "guide": {"name": "cfg" if guided else "none"},
            "scale": 4.0 if guided else 1.0,
            "cache": {"name": "none"},
        }
    )
