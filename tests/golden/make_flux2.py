"""Writes the golden files of tests/test_flux2_parity.py from diffusers' Flux2Transformer2DModel.

Two tiny models are filled with random weights (norms around 1, everything else around 0), rounded to float16 so that
the files are small, and run in float32: "dev" has a guidance embedding, "klein" has none and every setting of
config.json away from its default. Files: flux2_dev_diffusers.safetensors and flux2_klein_diffusers.safetensors (their
state dicts), flux2_dev_original.safetensors (the same numbers under the names of black-forest-labs/flux2, which
diffusers' own converter of single files must turn back into the state dict, bit for bit) and flux2_run.safetensors: for
each x [B, C, h, w] behind patches, t in 0..1, guidance, text and output [B, C, h, w], and of dev what it computes
without being told the guidance, as klein's pipeline asks whatever the weights have.

Needs torch 2.13, diffusers 0.42.1 with transformers (its pipeline packs latents) and safetensors:

  python -m tests.golden.make_flux2
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file

from tests.golden.make_flux import randomise

HERE = Path(__file__).resolve().parent
DEV = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (2, 4, 4, 6),
}
KLEIN = DEV | {
    "num_layers": 1,
    "num_single_layers": 2,
    "axes_dims_rope": (4, 2, 4, 6),
    "guidance_embeds": False,
    "mlp_ratio": 2.5,
    "rope_theta": 100,
    "eps": 1e-2,
    "timestep_guidance_channels": 32,
}
CASES = {"dev": DEV, "klein": KLEIN}
SIZE = (4, 6)  # of the latents behind patches
TEXT_TOKENS = 5
TIMES = (1.0, 0.75, 0.3, 0.01)
GUIDANCE = (3.5, 1.0, 7.0, 0.0)


def run(model: Any, size: tuple[int, int], text_tokens: int, times: Any, guidance: Any, seed: int) -> dict[str, Any]:
    """Inputs and what the reference computes, with the pipeline's own packing and places; guidance None: none."""
    c, rng, n = model.config, np.random.default_rng(seed), len(times)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=shape).astype(np.float32))

    x, text, t = normal(n, c.in_channels, *size), normal(n, text_tokens, c.joint_attention_dim), torch.tensor(times)
    arrays = {"x": x, "t": t, "text": text}
    if guidance is not None:
        arrays["guidance"] = torch.tensor(guidance)
    ids = Flux2KleinPipeline._prepare_latent_ids(x)
    with torch.no_grad():
        output = model(
            hidden_states=Flux2KleinPipeline._pack_latents(x),
            encoder_hidden_states=text,
            timestep=t,
            img_ids=ids,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(text),
            guidance=arrays.get("guidance"),
        ).sample
    return arrays | {"output": Flux2KleinPipeline._unpack_latents_with_ids(output, ids, *size).contiguous()}


def to_original(state: dict[str, torch.Tensor], double: int, single: int) -> dict[str, torch.Tensor]:
    """A state dict of diffusers under the names of black-forest-labs/flux2."""
    out = {}

    def move(new: str, *old: str) -> None:
        out[f"{new}.weight"] = torch.cat([state[f"{name}.weight"] for name in old])

    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    for new, old in {"time_in": "timestep", "guidance_in": "guidance"}.items():
        if f"time_guidance_embed.{old}_embedder.linear_1.weight" in state:
            move(f"{new}.in_layer", f"time_guidance_embed.{old}_embedder.linear_1")
            move(f"{new}.out_layer", f"time_guidance_embed.{old}_embedder.linear_2")
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        move(f"{name}.lin", f"{name}.linear")
    out["final_layer.adaLN_modulation.1.weight"] = torch.cat(state["norm_out.linear.weight"].chunk(2)[::-1])
    move("final_layer.linear", "proj_out")
    streams = {
        "img": ("to_{}", "norm_{}", "to_out.0", "ff"),
        "txt": ("add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
    }
    for i in range(double):
        for stream, (part, norm, proj, mlp) in streams.items():
            new, old = f"double_blocks.{i}.{stream}", f"transformer_blocks.{i}"
            move(f"{new}_attn.qkv", *(f"{old}.attn.{part.format(p)}" for p in "qkv"))
            move(f"{new}_attn.proj", f"{old}.attn.{proj}")
            move(f"{new}_mlp.0", f"{old}.{mlp}.linear_in")
            move(f"{new}_mlp.2", f"{old}.{mlp}.linear_out")
            for p, name in {"q": "query", "k": "key"}.items():
                out[f"{new}_attn.norm.{name}_norm.scale"] = state[f"{old}.attn.{norm.format(p)}.weight"]
    for i in range(single):
        new, old = f"single_blocks.{i}", f"single_transformer_blocks.{i}.attn"
        move(f"{new}.linear1", f"{old}.to_qkv_mlp_proj")
        move(f"{new}.linear2", f"{old}.to_out")
        for p, name in {"q": "query", "k": "key"}.items():
            out[f"{new}.norm.{name}_norm.scale"] = state[f"{old}.norm_{p}.weight"]
    return {name: tensor.contiguous() for name, tensor in out.items()}


def check_conversion(original: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """diffusers' own converter must turn `original` into `state`."""
    back = single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(dict(original))
    assert back.keys() == state.keys(), back.keys() ^ state.keys()
    for key in state:
        assert torch.equal(back[key], state[key]), key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    arrays = {}
    for case, geometry in CASES.items():
        model = Flux2Transformer2DModel(**geometry).eval().requires_grad_(False)
        randomise(model, seed=0)
        state = model.state_dict()
        files = {"diffusers": state}
        found = run(model, SIZE, TEXT_TOKENS, TIMES, GUIDANCE if case == "dev" else None, seed=1)
        if case == "dev":
            found["untold"] = run(model, SIZE, TEXT_TOKENS, TIMES, None, seed=1)["output"]
            files["original"] = to_original(state, geometry["num_layers"], geometry["num_single_layers"])
            check_conversion(files["original"], state)
        for layout, tensors in files.items():
            half = {key: tensor.half() for key, tensor in tensors.items()}
            assert all(torch.equal(half[key].float(), tensor) for key, tensor in tensors.items())
            save_file(half, args.out / f"flux2_{case}_{layout}.safetensors")
        arrays |= {f"{case}/{name}": array for name, array in found.items()}
    save_file(arrays, args.out / "flux2_run.safetensors")


if __name__ == "__main__":
    main()
