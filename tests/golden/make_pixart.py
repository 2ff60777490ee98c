"""Writes the golden files of tests/test_pixart_parity.py from diffusers' PixArtTransformer2DModel.

Two tiny models, "alpha" (micro-conditioned, positions of 128 x 128 latents at the default interpolation) and "sigma"
(neither; an interpolation of its own), are filled with random weights, tables of adaLN-single too, saved as their own
state dicts, and run on latents of two shapes with captions of several lengths. Files: pixart_<name>.safetensors
(weights) and pixart_<name>_run.safetensors: text [B, L, T], mask [B, L], t, resolution, aspect_ratio, and for each
shape x_<height>x<width> [B, C, H, W] with its output_<height>x<width>.

Needs torch 2.13, diffusers 0.42.1 and safetensors:

  python tests/golden/make_pixart.py
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
TIMES = (0, 50, 500, 999)
LENGTHS = (1, 5, 3, 7)  # of the captions, of at most 7 tokens
CASES = {
    "alpha": {"sample_size": 128},
    "sigma": {"sample_size": 16, "interpolation_scale": 3, "use_additional_conditions": False},
}
SHAPES = {"alpha": ((8, 8), (6, 10)), "sigma": ((16, 16), (12, 6))}


def build(name: str) -> PixArtTransformer2DModel:
    """A model of two blocks of width 24."""
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=20,
        patch_size=2,
        **CASES[name],
    )


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fills every parameter: weights with std 1/sqrt(inputs), tables with 0.5, biases with 0.1."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            std = 0.5 if "table" in name else 0.1 if p.ndim == 1 else p[0].numel() ** -0.5
            p.copy_(torch.from_numpy(rng.normal(0, std, p.shape).astype(np.float32)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    for seed, name in enumerate(CASES):
        model = build(name).eval().requires_grad_(False)
        randomise(model, seed)
        rng = np.random.default_rng(10 + seed)
        batch, tokens = len(TIMES), max(LENGTHS)
        run = {
            "t": torch.tensor(TIMES),
            "text": torch.from_numpy(rng.normal(size=(batch, tokens, 20)).astype(np.float32)),
            "mask": (torch.arange(tokens) < torch.tensor(LENGTHS)[:, None]).int(),
        }
        added = None
        if name == "alpha":
            run["resolution"] = torch.tensor([[1024.0, 1024.0], [768.0, 1344.0], [512.0, 2048.0], [1216.0, 832.0]])
            run["aspect_ratio"] = run["resolution"][:, :1] / run["resolution"][:, 1:]
            added = {"resolution": run["resolution"], "aspect_ratio": run["aspect_ratio"]}
        for height, width in SHAPES[name]:
            x = torch.from_numpy(rng.normal(size=(batch, 4, height, width)).astype(np.float32))
            output = model(
                x,
                encoder_hidden_states=run["text"],
                encoder_attention_mask=run["mask"],
                timestep=run["t"],
                added_cond_kwargs=added,
            ).sample
            run[f"x_{height}x{width}"], run[f"output_{height}x{width}"] = x, output
            print(f"{name} {height}x{width}: largest output {output.abs().max():.3f}, std {output.std():.3f}")
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, args.out / f"pixart_{name}.safetensors")
        run["t"] = run["t"].float()
        save_file({k: v.contiguous() for k, v in run.items()}, args.out / f"pixart_{name}_run.safetensors")


if __name__ == "__main__":
    main()
