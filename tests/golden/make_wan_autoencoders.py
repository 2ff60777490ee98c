"""Writes the golden files of tests/test_wan_autoencoder.py from diffusers' AutoencoderKLWan and AutoencoderKLQwenImage.

Tiny autoencoders are filled with random weights (norms too), rounded to float16, and run. Files:
  wan_autoencoder_<case>.safetensors   the state dict, float16
  wan_autoencoders.json                case -> "config": the arguments of the class, as a config.json; "original": the
    names of its tensors in the files of Wan-Video. diffusers' own converter must turn those of 2.1 back, or nothing is
    written; those of 2.2 are read from diffusers' scripts/convert_wan_to_diffusers.py
  wan_autoencoders_run.npz             <case>/<place>_<f>: latents [B, C, f, h, w] as a denoiser has them, and the
    pixels [B, 3, F, H, W] that they are decoded to; the latents that `pixels` are encoded to

The encoder of diffusers 0.42.1 hands arguments to its attention that it does not take, so that attn_scales cannot be
encoded with; here they are dropped.

Needs torch 2.13 and diffusers 0.42.1:

  python tests/golden/make_wan_autoencoders.py
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
RNG = np.random.default_rng(0)


def numbers(low: float, high: float) -> list[float]:
    return RNG.uniform(low, high, 4).round(4).tolist()


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "2.1": (
        AutoencoderKLWan,
        dict(base_dim=2, z_dim=4, attn_scales=[0.5]),
    ),
    "2.2": (
        AutoencoderKLWan,
        dict(
            base_dim=4,
            decoder_base_dim=6,
            z_dim=4,
            dim_mult=[1, 2, 2, 2],
            num_res_blocks=1,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
        ),
    ),
    "qwen": (
        AutoencoderKLQwenImage,
        dict(base_dim=4, z_dim=4, dim_mult=[1, 1, 2], num_res_blocks=2, temperal_downsample=[True, False]),
    ),
}
# of the modules in the order in which they stand in a block or level of Wan-Video's files
RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
RESIDUAL |= {"conv_shortcut": "shortcut"}
PARTS = {
    "mid_block.resnets.0": "middle.0",
    "mid_block.attentions.0": "middle.1",
    "mid_block.resnets.1": "middle.2",
    "norm_out": "head.0",
    "conv_out": "head.2",
    "conv_in": "conv1",
}
# frames of latents that are decoded and encoded; Qwen-Image has one
LENGTHS = {"2.1": (1, 2, 4), "2.2": (1, 3), "qwen": (1,)}
SIZES = {"2.1": (2, 3), "2.2": (2, 2), "qwen": (2, 3)}  # of latents
SIDES = {"2.1": 8, "2.2": 16, "qwen": 4}


def pixels(f: int, height: int, width: int) -> np.ndarray:
    """What is encoded to f latents, [1, 3, F, H, W]; the test draws the same."""
    return np.random.default_rng(f).uniform(-1, 1, (1, 3, 4 * f - 3, height, width)).astype(np.float32)


def randomise(model: torch.nn.Module) -> None:
    """Weights with std 1/sqrt(inputs), biases 0.5, norms around 1: vectors of two channels that
    nearly vanish before a norm would have few digits."""
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            norm = name.endswith("gamma")
            std = 0.3 if norm else 0.5 if p.ndim == 1 else 1.5 * p[0].numel() ** -0.5
            p.copy_(torch.from_numpy((norm + RNG.normal(0, std, p.shape)).astype(np.float16)).float())


def original_name(case: str, name: str) -> str:
    """The name of a tensor of diffusers in the files of Wan-Video."""
    for part, theirs in RESIDUAL.items():
        name = re.sub(rf"\.{part}\.", f".{theirs}.", name)
    for part, theirs in PARTS.items():
        name = name.replace(part, theirs)
    name = re.sub(r"^quant_conv", "conv1", re.sub(r"^post_quant_conv", "conv2", name))
    if case == "2.2":  # lists within lists
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"downsamples.\1.downsamples", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsampler", r"downsamples.\1.downsamples.1", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", r"upsamples.\1.upsamples", name)
        return re.sub(r"up_blocks\.(\d+)\.upsampler", r"upsamples.\1.upsamples.2", name)
    # one list: three blocks and what doubles the size
    flat = lambda m: f"upsamples.{4 * int(m[1]) + (3 if m[2] == 'upsamplers' else int(m[3]))}."  # noqa: E731
    name = re.sub(r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", flat, name)
    return name.replace("down_blocks", "downsamples")


@torch.no_grad()
def run(case: str) -> dict[str, np.ndarray]:
    kind, arguments = CASES[case]
    arguments |= {"latents_mean": numbers(-1, 1), "latents_std": numbers(0.5, 2)}
    model = kind(**arguments).eval()
    randomise(model)
    save_file(
        {name: t.half().contiguous() for name, t in model.state_dict().items()},
        HERE / f"wan_autoencoder_{case}.safetensors",
    )
    mean, std = (torch.tensor(arguments[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    found = {}
    for f in LENGTHS[case]:
        z = torch.from_numpy(RNG.normal(0, 1, (1, 4, f, *SIZES[case])).astype(np.float32))
        x = torch.from_numpy(pixels(f, *(SIDES[case] * n for n in SIZES[case])))
        found |= {f"latents_{f}": z, f"decoded_{f}": model.decode(z * std + mean).sample}
        found[f"encoded_{f}"] = (model.encode(x).latent_dist.mode() - mean) / std
    for name, array in found.items():
        assert torch.isfinite(array).all(), name
        print(case, name, tuple(array.shape), f"{array.std():.3f} {(array.abs() >= 1).float().mean():.3f}")
    return {f"{case}/{name}": array.numpy() for name, array in found.items()}


def main() -> None:
    forward = WanAttentionBlock.forward
    WanAttentionBlock.forward = lambda self, x, **dropped: forward(self, x)
    arrays = {name: array for case in CASES for name, array in run(case).items()}
    said: dict[str, Any] = {}
    for case, (kind, arguments) in CASES.items():
        said[case] = {"config": {"_class_name": kind.__name__, **arguments}}
        if case != "qwen":
            said[case]["original"] = {n: original_name(case, n) for n in kind(**arguments).state_dict()}
    theirs = said["2.1"]["original"]
    if convert_wan_vae_to_diffusers({o: n for n, o in theirs.items()}) != {n: n for n in theirs}:
        raise SystemExit("diffusers' converter does not turn the names of 2.1 back")
    np.savez_compressed(HERE / "wan_autoencoders_run.npz", **arrays)
    (HERE / "wan_autoencoders.json").write_text(json.dumps(said, indent=0) + "\n")


if __name__ == "__main__":
    main()
