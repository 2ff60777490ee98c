"""Writes the golden files of tests/test_qwen_image_parity.py from diffusers' QwenImageTransformer2DModel.

A tiny model is filled with random weights (norms around 1, everything else around 0), rounded to float16 so that the
files are small, and run in float32 on latents of two sizes, one of which has an odd number of rows and columns of
tokens, with prompts of several lengths. What stands behind a prompt's end is random. Files:
qwen_image_diffusers.safetensors (its own state dict) and qwen_image_run.safetensors (t in 0..1, text, mask, and for
each size x and output [B, C, H, W]).

Needs torch 2.13, diffusers 0.42.1 with transformers (its pipeline packs latents) and safetensors:

  python -m tests.golden.make_qwen_image
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from safetensors.torch import save_file

from tests.golden.make_flux import pack, randomise, unpack

HERE = Path(__file__).resolve().parent
GEOMETRY = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 10,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (2, 4, 4),
}
SIZES = ((8, 12), (10, 6))  # of the latents
TIMES = (1.0, 0.75, 0.3, 0.01)
LENGTHS = (5, 3, 1, 5)


def check_packing(x: torch.Tensor) -> None:
    """diffusers' own pipeline must pack and unpack alike."""
    n, c, height, width = x.shape
    assert torch.equal(pack(x), QwenImagePipeline._pack_latents(x, n, c, height, width))
    back = QwenImagePipeline._unpack_latents(pack(x), 8 * height, 8 * width, 8)
    assert torch.equal(unpack(pack(x), (height, width)), back[:, :, 0])


def network(model: Any, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None) -> Any:
    """The velocity [B, C, H, W] of latents x [B, C, H, W], as the pipeline asks for it."""
    size = (x.shape[2], x.shape[3])
    with torch.no_grad():
        output = model(
            hidden_states=pack(x),
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            timestep=t,
            img_shapes=[[(1, size[0] // 2, size[1] // 2)]] * len(x),
        ).sample
    return unpack(output, size).contiguous()


def run(model: Any, sizes: Any, times: Any, lengths: Any, seed: int) -> dict[str, torch.Tensor]:
    """Inputs and what the reference computes."""
    c, rng, n = model.config, np.random.default_rng(seed), len(times)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=shape).astype(np.float32))

    tokens = max(lengths)
    text, t = normal(n, tokens, c.joint_attention_dim), torch.tensor(times)
    mask = (torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]).int()
    arrays = {"t": t, "text": text, "mask": mask}
    for size in sizes:
        x = normal(n, c.in_channels // 4, *size)
        check_packing(x)
        name = "x".join(map(str, size))
        arrays |= {f"x_{name}": x, f"output_{name}": network(model, x, t, text, mask)}
    return arrays


def check_padding(model: Any, arrays: dict[str, torch.Tensor]) -> None:
    """The reference itself: a prompt alone, without a mask, gives what it gives among longer ones."""
    name = "x".join(map(str, SIZES[0]))
    for i, length in enumerate(LENGTHS):
        one = {key: arrays[key][i : i + 1] for key in (f"x_{name}", "t", "text")}
        alone = network(model, one[f"x_{name}"], one["t"], one["text"][:, :length], None)
        error = (alone - arrays[f"output_{name}"][i]).abs().max() / alone.abs().max()
        print(f"a prompt of {length} alone: {error:.1e}")
        assert error < 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    model = QwenImageTransformer2DModel(**GEOMETRY).eval().requires_grad_(False)
    randomise(model, seed=0)
    arrays = run(model, SIZES, TIMES, LENGTHS, seed=1)
    check_padding(model, arrays)
    half = {key: tensor.half() for key, tensor in model.state_dict().items()}
    assert all(torch.equal(half[key].float(), tensor) for key, tensor in model.state_dict().items())
    save_file(half, args.out / "qwen_image_diffusers.safetensors")
    save_file(arrays, args.out / "qwen_image_run.safetensors")


if __name__ == "__main__":
    main()
