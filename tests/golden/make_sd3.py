"""Writes the golden files of tests/test_sd3_parity.py from diffusers' SD3Transformer2DModel.

Tiny models of the forms of Stable Diffusion 3, 3.5-large, 3.5-medium and one with second attentions in places that no
published one has them, filled with random weights (norms around 1, everything else around 0, the table of positions
moved off its sines but in the first), rounded to float16 so that the files are small, and run in float32. Files, for
each: sd3_<form>_diffusers.safetensors (its own state dict), sd3_<form>_original.safetensors (the same numbers under the
names and in the order of Stability AI's single files, which diffusers' own converter must turn back into the state
dict, bit for bit) and sd3_<form>_run.safetensors (x [B, C, H, W], t in 0 ... 1000, text, pooled, output [B, C, H, W]).

Needs torch 2.13 and diffusers 0.42.1:

  python tests/golden/make_sd3.py
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
GEOMETRY: dict[str, Any] = {
    "sample_size": 12,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 6,
    "pos_embed_max_size": 10,
}
FORMS: dict[str, dict[str, Any]] = {
    "3": {},
    "35_large": {"qk_norm": "rms_norm"},
    "35_medium": {"qk_norm": "rms_norm", "num_layers": 4, "dual_attention_layers": (0, 1)},
    "odd": {"num_layers": 4, "dual_attention_layers": (1, 3)},
}
SIZE = (8, 12)  # of the latents: rows and columns differ
TEXT_TOKENS = 5
TIMES = (1000.0, 857.6923, 301.25, 8.75)


def randomise(model: Any, seed: int, positions: bool = True) -> None:
    """Fills every parameter: weights with std 1/sqrt(inputs), biases with 0.1, norms with 0.2 around 1; the table of
    positions gets noise of 0.3."""
    import torch

    rng = np.random.default_rng(seed)
    half = lambda value: torch.from_numpy(value.astype(np.float16).astype(np.float32))  # noqa: E731
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.ndim > 1:
                value = rng.normal(0, p[0].numel() ** -0.5, p.shape)
            else:
                norm = "norm" in name and not name.endswith("bias")
                value = rng.normal(1.0, 0.2, p.shape) if norm else rng.normal(0, 0.1, p.shape)
            p.copy_(half(value))
        table = model.pos_embed.pos_embed
        table.copy_(half(table.numpy() + (rng.normal(0, 0.3, table.shape) if positions else 0)))


def run(model: Any, size: tuple[int, int], text_tokens: int, times: Any, seed: int) -> dict[str, Any]:
    """Inputs and what the reference computes, as tensors."""
    import torch

    c, rng, n = model.config, np.random.default_rng(seed), len(times)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=shape).astype(np.float32))

    x, t = normal(n, c.in_channels, *size), torch.tensor(times)
    text, pooled = normal(n, text_tokens, c.joint_attention_dim), normal(n, c.pooled_projection_dim)
    with torch.no_grad():
        output = model(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample
    return {"x": x, "t": t, "text": text, "pooled": pooled, "output": output.contiguous()}


def to_original(state: dict[str, Any], depth: int) -> dict[str, Any]:
    """A state dict of diffusers under the names of Stability AI's single files."""
    import torch

    out = {"pos_embed": state["pos_embed.pos_embed"]}

    def move(new: str, *old: str, swap: bool = False) -> None:
        for kind in ("weight", "bias"):
            if f"{old[0]}.{kind}" in state:
                joined = torch.cat([state[f"{name}.{kind}"] for name in old])
                out[f"{new}.{kind}"] = torch.cat(joined.chunk(2)[::-1]) if swap else joined

    move("x_embedder.proj", "pos_embed.proj")
    move("context_embedder", "context_embedder")
    for new, old in {"t_embedder": "timestep", "y_embedder": "text"}.items():
        move(f"{new}.mlp.0", f"time_text_embed.{old}_embedder.linear_1")
        move(f"{new}.mlp.2", f"time_text_embed.{old}_embedder.linear_2")
    move("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    move("final_layer.linear", "proj_out")
    for i in range(depth):
        old = f"transformer_blocks.{i}"
        for stream, context in {"x": "", "context": "_context"}.items():
            new = f"joint_blocks.{i}.{stream}_block"
            swap = stream == "context" and i == depth - 1
            move(f"{new}.adaLN_modulation.1", f"{old}.norm1{context}.linear", swap=swap)
            move(f"{new}.mlp.fc1", f"{old}.ff{context}.net.0.proj")
            move(f"{new}.mlp.fc2", f"{old}.ff{context}.net.2")
        move(f"joint_blocks.{i}.context_block.attn.qkv", *(f"{old}.attn.add_{p}_proj" for p in "qkv"))
        move(f"joint_blocks.{i}.context_block.attn.proj", f"{old}.attn.to_add_out")
        for p in "qk":
            move(f"joint_blocks.{i}.context_block.attn.ln_{p}", f"{old}.attn.norm_added_{p}")
        for attn in ("attn", "attn2"):
            new = f"joint_blocks.{i}.x_block.{attn}"
            move(f"{new}.qkv", *(f"{old}.{attn}.to_{p}" for p in "qkv"))
            move(f"{new}.proj", f"{old}.{attn}.to_out.0")
            for p in "qk":
                move(f"{new}.ln_{p}", f"{old}.{attn}.norm_{p}")
    return {name: tensor.contiguous() for name, tensor in out.items()}


def check_conversion(original: dict[str, Any], state: dict[str, Any]) -> None:
    """diffusers' own converter must turn `original`, behind its prefix, into `state`."""
    import torch
    from diffusers.loaders import single_file_utils

    behind = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    back = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(behind)
    assert back.keys() == state.keys(), back.keys() ^ state.keys()
    for key in state:
        assert torch.equal(back[key], state[key]), key


def main() -> None:
    import torch
    from diffusers import SD3Transformer2DModel
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    for seed, (form, more) in enumerate(FORMS.items()):
        model = SD3Transformer2DModel(**(GEOMETRY | more)).eval().requires_grad_(False)
        randomise(model, seed, positions=form != "3")
        arrays = run(model, SIZE, TEXT_TOKENS, TIMES, seed=10 + seed)
        state = model.state_dict()
        original = to_original(state, model.config.num_layers)
        assert sum(a.numel() for a in original.values()) == sum(a.numel() for a in state.values())
        check_conversion(original, state)
        for name, tensors in {"diffusers": state, "original": original}.items():
            half = {key: tensor.half() for key, tensor in tensors.items()}
            assert all(torch.equal(half[key].float(), tensor) for key, tensor in tensors.items())
            save_file(half, args.out / f"sd3_{form}_{name}.safetensors")
        save_file(arrays, args.out / f"sd3_{form}_run.safetensors")
        output = arrays["output"]
        print(f"{form}: largest output {output.abs().max():.3f}, std {output.std():.3f}")


if __name__ == "__main__":
    main()
