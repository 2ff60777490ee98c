"""Writes the golden files of tests/test_wan_parity.py from diffusers' WanTransformer3DModel.

A tiny model is filled with random weights (tables and norms too), saved once as its own state dict and once under the
names of Wan-Video/Wan2.1, and run on latents of two shapes. diffusers' own converter must turn the second file into
the first, or nothing is written. Files: wan_diffusers.safetensors, wan_original.safetensors, and wan_run.safetensors:
text [B, L, T], t, and for each shape x_<f>x<h>x<w> [B, C, F, H, W] with its output_<f>x<h>x<w>.

Needs torch 2.13, diffusers 0.42.1 and safetensors:

  python tests/golden/make_wan.py
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
TIMES = (0, 50, 500, 999)
SHAPES = ((3, 6, 10), (4, 8, 4))
# names of a tensor in diffusers -> in Wan-Video/Wan2.1, in this order
ORIGINAL_NAMES = (
    (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^proj_out", "head.head"),
    (r"^scale_shift_table", "head.modulation"),
    (r"\.scale_shift_table", ".modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.norm2\.", ".norm3."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
)


def build() -> WanTransformer3DModel:
    """A model of three blocks of width 20, whose heads turn 6, 2 and 2 features with frame, row and column."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=10,
        in_channels=3,
        out_channels=3,
        text_dim=24,
        freq_dim=256,
        ffn_dim=36,
        num_layers=3,
    )


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fills every parameter: weights with std 1/sqrt(inputs), tables with 0.5, biases with 0.1, norms around 1."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            norm = "norm" in name and name.endswith("weight")
            std = 0.5 if "table" in name else 0.3 if norm else 0.1 if p.ndim == 1 else p[0].numel() ** -0.5
            p.copy_(torch.from_numpy((norm + rng.normal(0, std, p.shape)).astype(np.float32)))


def original_name(name: str) -> str:
    """The name in Wan-Video/Wan2.1 of a tensor of diffusers."""
    for pattern, replacement in ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    model = build().eval().requires_grad_(False)
    randomise(model, 0)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    original = {original_name(k): v for k, v in state.items()}
    converted = convert_wan_transformer_to_diffusers(dict(original))
    assert converted.keys() == state.keys(), sorted(converted.keys() ^ state.keys())
    assert all(torch.equal(converted[k], state[k]) for k in state)
    print(f"diffusers' converter maps {len(original)} original tensors onto its own state dict")
    rng = np.random.default_rng(1)
    run = {
        "t": torch.tensor(TIMES),
        "text": torch.from_numpy(rng.normal(size=(len(TIMES), 5, 24)).astype(np.float32)),
    }
    for shape in SHAPES:
        name = "x".join(map(str, shape))
        x = torch.from_numpy(rng.normal(size=(len(TIMES), 3, *shape)).astype(np.float32))
        output = model(x, timestep=run["t"], encoder_hidden_states=run["text"]).sample
        run[f"x_{name}"], run[f"output_{name}"] = x, output
        print(f"{name}: largest output {output.abs().max():.3f}, std {output.std():.3f}")
    run["t"] = run["t"].float()
    for name, tensors in (("diffusers", state), ("original", original), ("run", run)):
        save_file({k: v.contiguous() for k, v in tensors.items()}, args.out / f"wan_{name}.safetensors")


if __name__ == "__main__":
    main()
