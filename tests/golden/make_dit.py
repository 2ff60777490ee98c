"""Writes the golden files of tests/test_dit_parity.py from the two reference implementations of DiT.

For each layout a tiny model of the reference is filled with random weights (every zero-initialised layer
too, or the comparison would be empty), saved as its own state dict, and run. Files:
dit_<layout>.safetensors (weights) and dit_<layout>_run.safetensors (x [B, C, H, W], t, y, output).

Sample 0 of x is solved for, so that the tokens entering the first block's MLP have a variance near 1e-3:
only then is the epsilon of that block's norm (1e-6 or 1e-5) visible.

Needs torch 2.13, diffusers 0.42.1 and safetensors; for the original also timm (--no-deps is enough) and a
checkout of https://github.com/facebookresearch/DiT (the goldens are from its commit ed81ce22):

  python tests/golden/make_dit.py diffusers
  python tests/golden/make_dit.py original --checkout ../DiT
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
GEOMETRY = {"depth": 3, "width": 16, "heads": 4, "patch": 2, "size": 8, "channels": 4, "classes": 10}
TIMES = (0, 50, 500, 999)
LABELS = (3, 10)  # 10 is the null label of ten classes


class _Empty(type):
    """Makes classes of which every attribute exists (enumerations such as InterpolationMode)."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(types.ModuleType):
    """Stands in for torchvision, which timm imports for data sets only: any name is an empty class."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or _Empty(name, (), {})


def original(checkout: Path) -> torch.nn.Module:
    """The DiT of facebookresearch/DiT."""
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        folders = ("transforms", "transforms.functional", "ops", "ops.misc", "datasets", "models", "utils")
        for name in ("torchvision", *(f"torchvision.{f}" for f in folders)):
            sys.modules[name] = _Stub(name)
    spec = importlib.util.spec_from_file_location("reference_dit", checkout / "models.py")
    assert spec is not None and spec.loader is not None, checkout
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    g = GEOMETRY
    return module.DiT(
        input_size=g["size"],
        patch_size=g["patch"],
        in_channels=g["channels"],
        hidden_size=g["width"],
        depth=g["depth"],
        num_heads=g["heads"],
        num_classes=g["classes"],
        learn_sigma=True,
    )


def diffusers() -> torch.nn.Module:
    """DiTTransformer2DModel of diffusers."""
    from diffusers import DiTTransformer2DModel

    g = GEOMETRY
    return DiTTransformer2DModel(
        num_attention_heads=g["heads"],
        attention_head_dim=g["width"] // g["heads"],
        in_channels=g["channels"],
        out_channels=2 * g["channels"],
        num_layers=g["depth"],
        sample_size=g["size"],
        patch_size=g["patch"],
        num_embeds_ada_norm=g["classes"],
    )


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fills every parameter but the fixed positions: weights with std 1/sqrt(inputs), biases with 0.1."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if name == "pos_embed":
                continue
            fan_in = p[0].numel() if p.ndim > 1 else 100
            std = 1.0 if "embedding_table" in name else fan_in**-0.5
            value = rng.normal(0, std, p.shape)
            if p.ndim == 4:  # the patch kernel: square here, and orthogonal so that `inputs` can invert it well
                value = np.linalg.qr(value.reshape(len(value), -1))[0].reshape(p.shape)
            p.copy_(torch.from_numpy(value.astype(np.float32)))
        for name, p in model.named_parameters():
            if name.endswith(("blocks.0.adaLN_modulation.1.weight", "blocks.0.norm1.linear.weight")) or (
                name.endswith(("blocks.0.adaLN_modulation.1.bias", "blocks.0.norm1.linear.bias"))
            ):
                width = len(p) // 6
                p[2 * width : 3 * width] *= 0.01  # the first attention adds little: see the module's docstring
        if hasattr(model, "transformer_blocks"):
            first = model.transformer_blocks[0].norm1.emb
            for block in model.transformer_blocks[1:]:
                block.norm1.emb.load_state_dict(first.state_dict())


def inputs(model: torch.nn.Module, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, t and y: every time with every label."""
    g, rng = GEOMETRY, np.random.default_rng(seed)
    t = torch.tensor([t for t in TIMES for _ in LABELS])
    y = torch.tensor([y for _ in TIMES for y in LABELS])
    x = rng.normal(size=(len(t), g["channels"], g["size"], g["size"])).astype(np.float32)
    embed = model.x_embedder if hasattr(model, "x_embedder") else model.pos_embed
    positions = model.pos_embed if hasattr(model, "x_embedder") else model.pos_embed.pos_embed
    kernel = embed.proj.weight.detach().reshape(g["width"], -1).double()
    tokens = 0.03 * torch.from_numpy(rng.normal(size=positions.shape[1:]))
    wanted = tokens - positions.detach()[0].double() - embed.proj.bias.detach().double()
    patches = torch.linalg.lstsq(kernel, wanted.T).solution
    fold = torch.nn.functional.fold(patches, g["size"], g["patch"], stride=g["patch"])
    x[0] = fold.float().numpy()
    return torch.from_numpy(x), t, y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", choices=("original", "diffusers"))
    parser.add_argument("--checkout", type=Path, help="a checkout of facebookresearch/DiT")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    if args.layout == "original" and args.checkout is None:
        parser.error("original needs --checkout")
    model = original(args.checkout) if args.layout == "original" else diffusers()
    model.eval().requires_grad_(False)
    randomise(model, seed=0)
    x, t, y = inputs(model, seed=1)
    output = model(x, t, y) if args.layout == "original" else model(x, t, y).sample
    save_file(model.state_dict(), args.out / f"dit_{args.layout}.safetensors")
    run = {"x": x, "t": t.float(), "y": y.int(), "output": output}
    save_file({k: v.contiguous() for k, v in run.items()}, args.out / f"dit_{args.layout}_run.safetensors")
    print(f"{args.layout}: largest output {output.abs().max():.3f}, std {output.std():.3f}")


if __name__ == "__main__":
    main()
