"""Writes settings.npz for tests/test_settings.py: what diffusers' classes compute under settings of config.json.

Every case is a class, some keys of its config.json and the size of the input. Weights and inputs are drawn here from
numpy's frozen generator by case and by name, in the making of the file and in the test alike, so that the file holds
nothing but, for each case, the config.json that diffusers writes, the names and shapes of its tensors, and the output
[B, (F,) H, W, C].

Needs torch 2.13 and diffusers 0.42.1:

  python tests/golden/make_settings.py
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
BATCH = 2
BASES: dict[str, dict[str, Any]] = {
    "dit": dict(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5,
    ),
    "pixart": dict(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, caption_channels=20, patch_size=2, sample_size=16, use_additional_conditions=False,
    ),
    "wan": dict(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, ffn_dim=32, num_layers=2,
        text_dim=10, freq_dim=256, rope_max_seq_len=32,
    ),
    "flux": dict(
        num_attention_heads=2, attention_head_dim=16, in_channels=16, num_layers=1, num_single_layers=1,
        joint_attention_dim=10, pooled_projection_dim=6, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    ),
}  # fmt: skip
CLASSES = {
    "dit": "DiTTransformer2DModel",
    "pixart": "PixArtTransformer2DModel",
    "wan": "WanTransformer3DModel",
    "flux": "FluxTransformer2DModel",
}
# case -> (class, keys of config.json, size of the input)
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "dit as it is": ("dit", {}, (8, 8)),
    "dit norm_eps": ("dit", {"norm_eps": 1e-2}, (8, 8)),
    "dit gelu": ("dit", {"activation_fn": "gelu"}, (8, 8)),
    "dit geglu": ("dit", {"activation_fn": "geglu"}, (8, 8)),
    "dit geglu-approximate": ("dit", {"activation_fn": "geglu-approximate"}, (8, 8)),
    "dit swiglu": ("dit", {"activation_fn": "swiglu"}, (8, 8)),
    "dit linear-silu": ("dit", {"activation_fn": "linear-silu"}, (8, 8)),
    "dit without biases": ("dit", {"attention_bias": False}, (8, 8)),
    "dit affine": ("dit", {"norm_elementwise_affine": True, "norm_eps": 1e-3}, (8, 8)),
    "dit without variance": ("dit", {"out_channels": None, "num_embeds_ada_norm": 3}, (8, 8)),
    "dit own embedders": ("dit", {}, (8, 8)),
    "dit smaller": ("dit", {}, (4, 4)),
    "dit larger": ("dit", {}, (12, 12)),
    "pixart as it is": ("pixart", {}, (16, 16)),
    "pixart norm_eps": ("pixart", {"norm_eps": 1e-2}, (8, 8)),
    "pixart geglu": ("pixart", {"activation_fn": "geglu"}, (8, 8)),
    "pixart without biases": ("pixart", {"attention_bias": False}, (8, 8)),
    "pixart affine": ("pixart", {"norm_elementwise_affine": True, "norm_eps": 1e-3}, (8, 8)),
    "pixart without projection": ("pixart", {"caption_channels": None, "cross_attention_dim": 10}, (8, 8)),
    "pixart conditions": ("pixart", {"use_additional_conditions": True, "sample_size": 32}, (8, 12)),
    "pixart interpolation": ("pixart", {"interpolation_scale": 3}, (24, 8)),
    "pixart without variance": ("pixart", {"out_channels": None}, (8, 8)),
    "wan as it is": ("wan", {}, (2, 4, 6)),
    "wan freq_dim": ("wan", {"freq_dim": 32}, (2, 4, 6)),
    "wan eps": ("wan", {"eps": 1e-2}, (2, 4, 6)),
    "wan without cross norm": ("wan", {"cross_attn_norm": False}, (2, 4, 6)),
    "wan qk_norm null": ("wan", {"qk_norm": None}, (2, 4, 6)),
    "wan patches": ("wan", {"patch_size": (2, 1, 2)}, (4, 3, 4)),
    "flux as it is": ("flux", {}, (4, 6)),
    "flux without guidance": ("flux", {"guidance_embeds": False}, (6, 4)),
    "flux axes": ("flux", {"axes_dims_rope": (8, 2, 6), "pooled_projection_dim": 8}, (4, 8)),
}


def rng(case: str, name: str) -> np.random.RandomState:
    """numpy's frozen generator, by case and name."""
    return np.random.RandomState(zlib.crc32(f"{case}/{name}".encode()))


def draw_tensors(case: str, shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Weights with std 1/sqrt(inputs), tables 0.5, vectors 0.1, norms around 1; one embedder for a whole DiT."""
    tensors = {}
    for name, shape in shapes.items():
        same = ".norm1.emb." in name and case != "dit own embedders"
        source = "0" + name[name.index(".norm1.emb.") :] if same else name
        std = 0.5 if "table" in name else 0.1 if len(shape) == 1 else float(np.prod(shape[1:])) ** -0.5
        norm = len(shape) == 1 and name.endswith("weight")
        tensors[name] = (rng(case, source).normal(float(norm), std, shape)).astype(np.float32)
    return tensors


def draw_inputs(case: str) -> dict[str, np.ndarray]:
    """x [B, (F,) H, W, C], the model's time t [B] (of 1000, an exact fraction), the condition as difax takes it."""
    kind, keys, size = CASES[case]
    config = BASES[kind] | keys
    normal = lambda name, *shape: rng(case, name).normal(size=(BATCH, *shape)).astype(np.float32)  # noqa: E731
    found = {"x": normal("x", *size, 4), "t": np.array([125.0, 750.0], np.float32)}
    if kind == "dit":
        return found | {"label": np.array([1, config["num_embeds_ada_norm"]], np.int32)}
    if kind == "pixart":
        found["text"] = normal("text", 3, config["caption_channels"] or config["cross_attention_dim"])
        found["mask"] = np.array([[1, 1, 0], [1, 0, 0]], np.int32)
        if config["use_additional_conditions"]:
            found["resolution"] = np.array([[512.0, 512.0], [768.0, 1024.0]], np.float32)
            found["aspect_ratio"] = np.array([[1.0], [0.75]], np.float32)
        return found
    if kind == "wan":
        return found | {"text": normal("text", 3, config["text_dim"])}
    found |= {"text": normal("text", 3, config["joint_attention_dim"])}
    found |= {"pooled": normal("pooled", config["pooled_projection_dim"])}
    return found | ({"guidance": np.array([0.25, 0.5], np.float32)} if config["guidance_embeds"] else {})


def run(kind: str, model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """What a class of diffusers gives, [B, (F,) H, W, C]."""
    import torch

    given = {name: torch.from_numpy(a) for name, a in inputs.items()}
    x, t = given["x"].movedim(-1, 1), given["t"]
    if kind == "dit":
        return model(x, t.long(), given["label"].long()).sample.movedim(1, -1).numpy()
    if kind == "pixart":
        added = {name: given[name] for name in ("resolution", "aspect_ratio") if name in given} or None
        more = {"encoder_hidden_states": given["text"], "encoder_attention_mask": given["mask"]}
        return model(x, timestep=t.long(), added_cond_kwargs=added, **more).sample.movedim(1, -1).numpy()
    if kind == "wan":
        return model(x, t.long(), given["text"]).sample.movedim(1, -1).numpy()
    b, height, width, c = given["x"].shape
    rows, columns = height // 2, width // 2
    packed = given["x"].reshape(b, rows, 2, columns, 2, c).permute(0, 1, 3, 5, 2, 4).reshape(b, rows * columns, 4 * c)
    ids = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
    output = model(
        packed,
        given["text"],
        given["pooled"],
        t / 1000,
        ids.reshape(-1, 3),
        torch.zeros(given["text"].shape[1], 3),
        given.get("guidance"),
    ).sample
    return output.reshape(b, rows, columns, c, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(b, height, width, c).numpy()


def main() -> None:
    import diffusers
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    arrays, facts = {}, {}
    for case, (kind, keys, _) in CASES.items():
        model = getattr(diffusers, CLASSES[kind])(**(BASES[kind] | keys)).eval().requires_grad_(False)
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        model.load_state_dict({name: torch.from_numpy(a) for name, a in draw_tensors(case, shapes).items()})
        arrays[case] = run(kind, model, draw_inputs(case)).astype(np.float32)
        facts[case] = {"config": json.loads(model.to_json_string()), "shapes": shapes}
        print(f"{case}: {arrays[case].shape}, largest output {np.abs(arrays[case]).max():.3f}")
    np.savez_compressed(args.out / "settings.npz", facts=np.array(json.dumps(facts)), **arrays)


if __name__ == "__main__":
    main()
