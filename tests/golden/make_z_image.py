"""Writes the golden files of tests/test_z_image_parity.py from diffusers' ZImageTransformer2DModel.

A tiny model is filled with random weights (norms around 1, everything else around 0), rounded to float16 so that the
files are small, and run in float32 on one batch of captions of unequal lengths, and on each of them alone. Files:
z_image_diffusers.safetensors (its own state dict), z_image_original.safetensors (the same numbers under the names of
single files, which diffusers' own converter must turn back into the state dict, bit for bit) and
z_image_run.safetensors (x [B, C, H, W], t in 0..1 with 1 = noise, text [B, L, features] and its mask, output
[B, C, H, W]: x0 - eps, as the network returns it).

The class gives the time's MLP 1024 hidden features whatever the rest is; here it has 24, so that the files stay small.

Needs torch 2.13, diffusers 0.42.1 and safetensors:

  python tests/golden/make_z_image.py
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ZImageTransformer2DModel
from diffusers.loaders import single_file_utils
from diffusers.models.transformers.transformer_z_image import TimestepEmbedder
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
GEOMETRY = {
    "in_channels": 4,
    "dim": 20,
    "n_layers": 3,
    "n_refiner_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 12,
    "axes_dims": [2, 4, 4],
    "axes_lens": [128, 16, 16],
}
TIME_HIDDEN = 24
SIZE = (8, 12)  # of the latents: 24 patches, to which 8 tokens are added
LENGTHS = (5, 32, 40, 63)  # of captions, filled up to 32, 32, 64, 64
TIMES = (1.0, 0.75, 0.3, 0.01)


def build(**geometry: Any) -> Any:
    """A random model of the class, its time's MLP narrow."""
    model = ZImageTransformer2DModel(**geometry)
    model.t_embedder = TimestepEmbedder(min(geometry["dim"], 256), mid_size=TIME_HIDDEN)
    return model.eval().requires_grad_(False)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fills every parameter: weights with std 1/sqrt(inputs), biases with 0.1, learned tokens with 1, norms with 0.2
    around 1."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if name.endswith("pad_token"):
                value = rng.normal(0, 1, p.shape)
            elif p.ndim > 1:
                value = rng.normal(0, p[0].numel() ** -0.5, p.shape)
            else:
                norm = name.endswith("weight")  # what has one axis and is no bias
                value = rng.normal(1.0, 0.2, p.shape) if norm else rng.normal(0, 0.1, p.shape)
            p.copy_(torch.from_numpy(value.astype(np.float16).astype(np.float32)))


def call(model: Any, x: torch.Tensor, t: torch.Tensor, captions: list[torch.Tensor]) -> torch.Tensor:
    """What the network returns for latents [B, C, H, W], as its pipeline calls it."""
    with torch.no_grad():
        out = model(list(x[:, :, None].unbind(0)), 1 - t, captions, return_dict=False)[0]
    return torch.stack(out)[:, :, 0]


def run(model: Any, size: tuple[int, int], lengths: Any, times: Any, seed: int) -> dict[str, Any]:
    """Inputs and what the reference computes, as tensors; a batch must be its singles."""
    c, rng, n = model.config, np.random.default_rng(seed), len(times)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=shape).astype(np.float32))

    x, t = normal(n, c.in_channels, *size), torch.tensor(times)
    captions = [normal(length, c.cap_feat_dim) for length in lengths]
    output = call(model, x, t, captions)
    for i, caption in enumerate(captions):
        alone = call(model, x[i : i + 1], t[i : i + 1], [caption])[0]
        assert (alone - output[i]).abs().max() <= 1e-5 * output.abs().max()
    text, mask = torch.zeros(n, max(lengths), c.cap_feat_dim), torch.zeros(n, max(lengths), dtype=torch.int32)
    for i, caption in enumerate(captions):
        text[i, : len(caption)], mask[i, : len(caption)] = caption, 1
    return {"x": x, "t": t, "text": text, "mask": mask, "output": output.contiguous()}


def to_original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of diffusers under the names of single files."""
    out, parts = {}, {}
    for name, tensor in state.items():
        head, attention, part = name.rpartition(".to_")
        if attention and part in ("q.weight", "k.weight", "v.weight"):
            parts.setdefault(f"{head}.qkv.weight", {})[part[0]] = tensor
            continue
        for new, old in {
            "x_embedder.": "all_x_embedder.2-1.",
            "final_layer.": "all_final_layer.2-1.",
            "attention.out.": "attention.to_out.0.",
            "attention.q_norm.": "attention.norm_q.",
            "attention.k_norm.": "attention.norm_k.",
        }.items():
            name = name.replace(old, new)
        out[name] = tensor
    out |= {name: torch.cat([three[p] for p in "qkv"]) for name, three in parts.items()}
    return {name: tensor.contiguous() for name, tensor in out.items()}


def check_conversion(original: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """diffusers' own converter must turn `original` into `state`, and drop a norm that nothing reads."""
    convert = single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers
    back = convert(dict(original) | {"norm_final.weight": torch.ones(3)})
    assert back.keys() == state.keys(), back.keys() ^ state.keys()
    for key in state:
        assert torch.equal(back[key], state[key]), key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    model = build(**GEOMETRY)
    randomise(model, seed=0)
    arrays = run(model, SIZE, LENGTHS, TIMES, seed=1)
    state = model.state_dict()
    original = to_original(state)
    check_conversion(original, state)
    for name, tensors in {"diffusers": state, "original": original}.items():
        half = {key: tensor.half() for key, tensor in tensors.items()}
        assert all(torch.equal(half[key].float(), tensor) for key, tensor in tensors.items())
        save_file(half, args.out / f"z_image_{name}.safetensors")
    save_file(arrays, args.out / "z_image_run.safetensors")
    output = arrays["output"]
    print(f"largest output {output.abs().max():.3f}, std {output.std():.3f}")


if __name__ == "__main__":
    main()
