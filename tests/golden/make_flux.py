"""Writes the golden files of tests/test_flux_parity.py from diffusers' FluxTransformer2DModel.

A tiny model is filled with random weights (norms around 1, everything else around 0), rounded to float16 so that the
files are small, and run in float32. Files: flux_diffusers.safetensors (its own state dict), flux_original.safetensors
(the same numbers under the names and in the order of black-forest-labs/flux, which diffusers' own converter of
single files must turn back into the state dict, bit for bit) and flux_run.safetensors (x [B, C, H, W], t in 0..1,
guidance, text, pooled, output [B, C, H, W]).

Needs torch 2.13, diffusers 0.42.1 with transformers (its pipeline packs latents) and safetensors. With --checkout, a
clone of https://github.com/black-forest-labs/flux (and einops), the original's own code must compute the same output
(2.4e-7 off with its commit 802fb471):

  python tests/golden/make_flux.py
  python tests/golden/make_flux.py --checkout ../flux
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
GEOMETRY = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 10,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 6,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 4, 4),
}
SIZE = (8, 12)  # of the latents: rows and columns differ
TEXT_TOKENS = 5
TIMES = (1.0, 0.75, 0.3, 0.01)
GUIDANCE = (3.5, 1.0, 7.0, 0.0)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fills every parameter: weights with std 1/sqrt(inputs), biases with 0.1, norms with 0.2 around 1."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.ndim > 1:
                value = rng.normal(0, p[0].numel() ** -0.5, p.shape)
            else:
                norm = "norm" in name and not name.endswith("bias")
                value = rng.normal(1.0, 0.2, p.shape) if norm else rng.normal(0, 0.1, p.shape)
            p.copy_(torch.from_numpy(value.astype(np.float16).astype(np.float32)))


def pack(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, (H/2)(W/2), 4 C], features over channel, row, column."""
    return torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)


def unpack(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The inverse of `pack`."""
    return torch.nn.functional.fold(x.transpose(1, 2), size, 2, stride=2)


def image_ids(size: tuple[int, int]) -> torch.Tensor:
    """(0, row, column) of every image token."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(size[0] / 2), torch.arange(size[1] / 2))


def check_packing(x: torch.Tensor) -> None:
    """diffusers' own pipeline must pack, unpack and number the tokens alike."""
    from diffusers import FluxPipeline  # needs transformers

    n, c, height, width = x.shape
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, n, c, height, width))
    assert torch.equal(
        unpack(pack(x), (height, width)), FluxPipeline._unpack_latents(pack(x), 8 * height, 8 * width, 8)
    )
    ids = FluxPipeline._prepare_latent_image_ids(n, height // 2, width // 2, "cpu", torch.float32)
    assert torch.equal(image_ids((height, width)), ids)


def run(model: Any, size: tuple[int, int], text_tokens: int, times: Any, guidance: Any, seed: int) -> dict[str, Any]:
    """Inputs and what the reference computes, as tensors."""
    c, rng, n = model.config, np.random.default_rng(seed), len(times)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=shape).astype(np.float32))

    x = normal(n, c.in_channels // 4, *size)
    text, pooled = normal(n, text_tokens, c.joint_attention_dim), normal(n, c.pooled_projection_dim)
    t, scale = torch.tensor(times), torch.tensor(guidance)
    inputs = {
        "hidden_states": pack(x),
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "timestep": t,
        "guidance": scale if c.guidance_embeds else None,
        "img_ids": image_ids(size),
        "txt_ids": torch.zeros(text_tokens, 3),
    }
    with torch.no_grad():
        output = unpack(model(**inputs).sample, size)
    return {"x": x, "t": t, "guidance": scale, "text": text, "pooled": pooled, "output": output.contiguous()}


def to_original(state: dict[str, torch.Tensor], double: int, single: int) -> dict[str, torch.Tensor]:
    """A state dict of diffusers under the names of black-forest-labs/flux."""
    out = {}

    def move(new: str, *old: str, swap: bool = False) -> None:
        for kind in ("weight", "bias"):
            joined = torch.cat([state[f"{name}.{kind}"] for name in old])
            out[f"{new}.{kind}"] = torch.cat(joined.chunk(2)[::-1]) if swap else joined

    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    for new, old in {"time_in": "timestep", "vector_in": "text", "guidance_in": "guidance"}.items():
        if f"time_text_embed.{old}_embedder.linear_1.weight" in state:
            move(f"{new}.in_layer", f"time_text_embed.{old}_embedder.linear_1")
            move(f"{new}.out_layer", f"time_text_embed.{old}_embedder.linear_2")
    move("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    move("final_layer.linear", "proj_out")
    streams = {
        "img": ("norm1", "to_{}", "norm_{}", "to_out.0", "ff"),
        "txt": ("norm1_context", "add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
    }
    for i in range(double):
        for stream, (ada, part, norm, proj, mlp) in streams.items():
            new, old = f"double_blocks.{i}.{stream}", f"transformer_blocks.{i}"
            move(f"{new}_mod.lin", f"{old}.{ada}.linear")
            move(f"{new}_attn.qkv", *(f"{old}.attn.{part.format(p)}" for p in "qkv"))
            move(f"{new}_attn.proj", f"{old}.attn.{proj}")
            move(f"{new}_mlp.0", f"{old}.{mlp}.net.0.proj")
            move(f"{new}_mlp.2", f"{old}.{mlp}.net.2")
            for p, name in {"q": "query", "k": "key"}.items():
                out[f"{new}_attn.norm.{name}_norm.scale"] = state[f"{old}.attn.{norm.format(p)}.weight"]
    for i in range(single):
        new, old = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        move(f"{new}.modulation.lin", f"{old}.norm.linear")
        move(f"{new}.linear1", *(f"{old}.attn.to_{p}" for p in "qkv"), f"{old}.proj_mlp")
        move(f"{new}.linear2", f"{old}.proj_out")
        for p, name in {"q": "query", "k": "key"}.items():
            out[f"{new}.norm.{name}_norm.scale"] = state[f"{old}.attn.norm_{p}.weight"]
    return {name: tensor.contiguous() for name, tensor in out.items()}


def check_conversion(original: dict[str, torch.Tensor], state: dict[str, torch.Tensor], width: int) -> None:
    """diffusers' own converter must turn `original` into `state`."""
    name = "convert_flux_transformer_checkpoint_to_diffusers"
    source = inspect.getsource(getattr(single_file_utils, name))
    assert source.count("inner_dim = 3072") == 1  # it knows one width
    names = {"torch": torch}
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), names)
    back = names[name](dict(original))
    assert back.keys() == state.keys(), back.keys() ^ state.keys()
    for key in state:
        assert torch.equal(back[key], state[key]), key


def check_original(checkout: Path, original: dict[str, torch.Tensor], model: Any, arrays: dict[str, Any]) -> None:
    """The code of black-forest-labs/flux must compute the same output from the original layout."""
    package = types.ModuleType("flux")  # its __init__ wants packages that the network does not need
    package.__path__ = [str(checkout / "src" / "flux")]
    sys.modules["flux"] = package
    module, c = importlib.import_module("flux.model"), model.config
    width = c.num_attention_heads * c.attention_head_dim
    params = module.FluxParams(
        in_channels=c.in_channels,
        out_channels=c.in_channels,
        vec_in_dim=c.pooled_projection_dim,
        context_in_dim=c.joint_attention_dim,
        hidden_size=width,
        mlp_ratio=4.0,
        num_heads=c.num_attention_heads,
        depth=c.num_layers,
        depth_single_blocks=c.num_single_layers,
        axes_dim=list(c.axes_dims_rope),
        theta=10_000,
        qkv_bias=True,
        guidance_embed=c.guidance_embeds,
    )
    reference = module.Flux(params).eval()
    reference.load_state_dict(original)
    n, size = len(arrays["x"]), tuple(arrays["x"].shape[2:])
    with torch.no_grad():
        output = reference(
            img=pack(arrays["x"]),
            img_ids=image_ids(size)[None].expand(n, -1, -1),
            txt=arrays["text"],
            txt_ids=torch.zeros(*arrays["text"].shape[:2], 3),
            timesteps=arrays["t"],
            y=arrays["pooled"],
            guidance=arrays["guidance"],
        )
    error = (unpack(output, size) - arrays["output"]).abs().max() / arrays["output"].abs().max()
    print(f"black-forest-labs/flux against diffusers: {error:.1e}")
    assert error < 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="a clone of black-forest-labs/flux")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    model = FluxTransformer2DModel(**GEOMETRY).eval().requires_grad_(False)
    randomise(model, seed=0)
    arrays = run(model, SIZE, TEXT_TOKENS, TIMES, GUIDANCE, seed=1)
    check_packing(arrays["x"])
    state = model.state_dict()
    original = to_original(state, GEOMETRY["num_layers"], GEOMETRY["num_single_layers"])
    check_conversion(original, state, width=GEOMETRY["attention_head_dim"] * GEOMETRY["num_attention_heads"])
    if args.checkout is not None:
        check_original(args.checkout, original, model, arrays)
    for name, tensors in {"diffusers": state, "original": original}.items():
        half = {key: tensor.half() for key, tensor in tensors.items()}
        assert all(torch.equal(half[key].float(), tensor) for key, tensor in tensors.items())
        save_file(half, args.out / f"flux_{name}.safetensors")
    save_file(arrays, args.out / "flux_run.safetensors")
    output = arrays["output"]
    print(f"largest output {output.abs().max():.3f}, std {output.std():.3f}")


if __name__ == "__main__":
    main()
