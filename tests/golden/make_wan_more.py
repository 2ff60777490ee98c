"""Writes wan_more.npz for tests/test_wan_image.py: Wan's image-to-video networks, and one with a time per token; and
wan_experts.npz for tests/test_experts.py: runs of WanPipeline with two networks.

Every case is keys of diffusers' WanTransformer3DModel; weights and inputs are drawn by case and by name from numpy's
frozen generator (`make_settings.rng`), so that the file holds nothing but the config.json that diffusers writes, the
tensors' names, those of Wan-Video and shapes, and the output [B, C, F, H, W]. diffusers' own converter must turn the
names of Wan-Video into its own, but for the learned positions, which it does not know.

Needs torch 2.13 and diffusers 0.42.1:

  python tests/golden/make_wan_more.py
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from tests.golden.make_settings import rng  # noqa: E402

# the reference takes the caption for 512 tokens, and what is before it for the image
BATCH, SIZE, TEXT = 2, (3, 4, 6), 512
BASE: dict[str, Any] = dict(
    num_attention_heads=2, attention_head_dim=10, text_dim=6, ffn_dim=16, num_layers=2, rope_max_seq_len=32,
)  # fmt: skip
WITH_IMAGE = dict(in_channels=8, out_channels=3, image_dim=12, added_kv_proj_dim=20)
# case -> keys of config.json
CASES: dict[str, dict[str, Any]] = {
    "i2v 2.1": WITH_IMAGE,
    "flf2v": WITH_IMAGE | dict(pos_embed_seq_len=14, eps=1e-3),
    "image without keys of its own": WITH_IMAGE | dict(added_kv_proj_dim=None),
    "i2v 2.2": dict(in_channels=8, out_channels=3),
    "ti2v": dict(in_channels=5, out_channels=5),
    "a time per token": dict(in_channels=5, out_channels=5),  # the same for all, as WanPipeline has it for 2.2's 5B
}
IMAGE_TOKENS = 7  # of one picture
TIMES = np.array([999.0, 125.0], np.float32)
# names of a tensor in diffusers -> in Wan-Video, beside those of make_wan.py
ORIGINAL_IMAGE = (
    (r"^condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"^condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
)


def draw_tensors(case: str, shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Weights with std 1/sqrt(inputs), tables and positions 0.5, biases 0.1, norms around 1."""
    tensors = {}
    for name, shape in shapes.items():
        norm = len(shape) == 1 and name.endswith("weight")
        wide = "table" in name or "pos_embed" in name
        std = 0.5 if wide else 0.3 if norm else 0.1 if len(shape) == 1 else float(np.prod(shape[1:])) ** -0.5
        tensors[name] = rng(case, name).normal(float(norm), std, shape).astype(np.float32)
    return tensors


def draw_inputs(case: str) -> dict[str, np.ndarray]:
    """What difax takes, channels last: x, t [B], text, and by the case condition, image and first_frame."""
    keys = BASE | CASES[case]
    normal = lambda name, *shape: rng(case, name).normal(size=(BATCH, *shape)).astype(np.float32)  # noqa: E731
    found = {"x": normal("x", *SIZE, keys["out_channels"]), "t": TIMES, "text": normal("text", TEXT, keys["text_dim"])}
    more = keys["in_channels"] - keys["out_channels"]
    if more:
        found["condition"] = normal("condition", *SIZE, more)
    if "image_dim" in keys:
        tokens = keys.get("pos_embed_seq_len", IMAGE_TOKENS)
        found["image"] = 3 * normal("image", tokens, keys["image_dim"]) + 1
    if case == "ti2v":
        found["first_frame"] = normal("first_frame", *SIZE[1:], keys["out_channels"])
    return found


# ---- two networks ----------------------------------------------------------------------------------------------------

BOUNDARY, STEPS, SCALES = 0.875, 6, ((4.0, None), (4.0, 3.0))  # the second scale is that of transformer_2
EXPERTS: dict[str, Any] = BASE | dict(in_channels=3, out_channels=3)
SCHEDULER: dict[str, Any] = dict(
    prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
)
NAMES = ("transformer", "transformer_2")


def draw_run() -> dict[str, np.ndarray]:
    """Latents [1, F, H, W, C] to begin from, the caption and the negative one."""
    text = {name: rng("experts", name).normal(size=(1, 5, 6)).astype(np.float32) for name in ("text", "null_text")}
    return text | {"latents": rng("experts", "latents").normal(size=(1, *SIZE, 3)).astype(np.float32)}


def write_experts(out: Path) -> None:
    import torch
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    networks, shapes = {}, {}
    for name in NAMES:
        networks[name] = WanTransformer3DModel(**EXPERTS).eval().requires_grad_(False)
        shapes = {key: list(a.shape) for key, a in networks[name].state_dict().items()}
        tensors = draw_tensors(name, shapes)
        networks[name].load_state_dict({key: torch.from_numpy(a) for key, a in tensors.items()})
    scheduler = UniPCMultistepScheduler(**SCHEDULER)
    pipeline = WanPipeline(None, None, None, scheduler, boundary_ratio=BOUNDARY, **networks)
    pipeline.set_progress_bar_config(disable=True)
    run = {name: torch.from_numpy(a) for name, a in draw_run().items()}
    arrays = {}
    for i, (scale, second) in enumerate(SCALES):
        path: list[Any] = []

        def kept(pipeline: Any, step: int, t: Any, seen: dict[str, Any], path: list[Any] = path) -> dict[str, Any]:
            path.append(seen["latents"].clone())
            return {}

        pipeline(
            prompt_embeds=run["text"], negative_prompt_embeds=run["null_text"],
            latents=run["latents"].permute(0, 4, 1, 2, 3).clone(), num_inference_steps=STEPS, guidance_scale=scale,
            guidance_scale_2=second, height=8 * SIZE[1], width=8 * SIZE[2], num_frames=4 * SIZE[0] - 3,
            output_type="latent", callback_on_step_end=kept,
        )  # fmt: skip
        arrays[f"path/{i}"] = torch.stack(path).permute(0, 1, 3, 4, 5, 2).numpy()
        told = scheduler.timesteps.tolist()
        print(f"two networks at {scale}, {second}: told {told}, largest {arrays[f'path/{i}'].max():.3f}")
    facts = {"config": {**scheduler.config, "_class_name": "UniPCMultistepScheduler"}, "shapes": shapes}
    np.savez_compressed(out / "wan_experts.npz", facts=json.dumps(facts), told=scheduler.timesteps.numpy(), **arrays)


def main() -> None:
    import re

    import torch
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    from tests.golden.make_wan import original_name

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    arrays, facts = {}, {}
    for case, keys in CASES.items():
        model = WanTransformer3DModel(**BASE, **keys).eval().requires_grad_(False)
        state = model.state_dict()
        shapes = {name: list(a.shape) for name, a in state.items()}
        tensors = draw_tensors(case, shapes)
        model.load_state_dict({name: torch.from_numpy(a) for name, a in tensors.items()})
        names = {}
        for name in state:
            moved = name
            for pattern, replacement in ORIGINAL_IMAGE:
                moved = re.sub(pattern, replacement, moved)
            names[name] = original_name(moved)
        original = {names[name]: a for name, a in state.items()}
        known = {name: a for name, a in original.items() if name != "img_emb.emb_pos"}
        converted = convert_wan_transformer_to_diffusers(dict(known))
        assert converted.keys() == state.keys() - {"condition_embedder.image_embedder.pos_embed"}
        assert all(torch.equal(a, state[name]) for name, a in converted.items())
        inputs = {name: torch.from_numpy(a) for name, a in draw_inputs(case).items()}
        x = inputs["x"]
        if "condition" in inputs:
            x = torch.cat([x, inputs["condition"]], -1)
        time = inputs["t"]
        if "first_frame" in inputs:  # as WanImageToVideoPipeline with expand_timesteps
            mask = torch.ones(SIZE)
            mask[0] = 0
            x = (1 - mask)[None, ..., None] * inputs["first_frame"][:, None] + mask[None, ..., None] * x
            time = torch.stack([(mask[:, ::2, ::2] * t).flatten() for t in time])
        if case == "a time per token":
            time = time[:, None].expand(BATCH, SIZE[0] * SIZE[1] * SIZE[2] // 4)
        image = inputs.get("image")
        if image is not None and "pos_embed_seq_len" in keys:  # the two pictures are rows of a batch of twice the size
            image = image.reshape(2 * BATCH, -1, image.shape[-1])
        output = model(
            x.permute(0, 4, 1, 2, 3), time, inputs["text"], encoder_hidden_states_image=image, return_dict=False
        )[0]
        arrays[case] = output.numpy()
        config = {key: value for key, value in model.config.items() if not key.startswith("_use")}
        facts[case] = {
            "config": {**config, "_class_name": "WanTransformer3DModel"},
            "shapes": shapes,
            "original": names,
        }
        print(f"{case}: largest output {output.abs().max():.3f}")
    np.savez_compressed(args.out / "wan_more.npz", facts=json.dumps(facts), **arrays)
    write_experts(args.out)


if __name__ == "__main__":
    main()
