"""Writes what diffusers makes of an image: pipeline_wan_i2v, a tiny pipeline from image to video as diffusers saves it,
with the parts of two others (more/ti2v, more/a14b), and image_in.npz, runs from image to image and of inpainting on
pipelines that lie elsewhere.

  python tests/golden/make_image_in.py PIPELINES       (torch 2.13.0, diffusers 0.42.1, transformers 5.24.0)

Runs on the CPU in float32. PIPELINES holds the folders flux_dev, sd3, qwen_image, z_image of tiny pipelines. Latents of
images are the means of their distributions here, where the pipelines from image to image draw from them.
"""

import importlib
import json
import pathlib
import shutil
import sys
import types

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from make_pipelines import ENCODER, randomised, tokenizer
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

HERE = pathlib.Path(__file__).resolve().parent
PROMPT, NEGATIVE, STEPS = "a red fox jumps over 3 logs", "blurry", 3


def picture(size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3], smooth and with an edge."""
    h, w = size
    rows, columns = np.meshgrid(np.linspace(0, 1, h), np.linspace(0, 1, w), indexing="ij")
    colours = [rows, columns, (np.hypot(rows - 0.4, columns - 0.6) < 0.3).astype(float)]
    return np.round(255 * np.stack(colours, -1)).astype(np.uint8)


def transformer(seed: int, **more) -> WanTransformer3DModel:
    made = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=6, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=32, num_layers=1, **more,
    )  # fmt: skip
    return randomised(made, seed)


def image_to_video(kind: str) -> WanImageToVideoPipeline:
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.1, 0.9, 1.0, 1.2],
    )  # fmt: skip
    parts = {
        "tokenizer": tokenizer(HERE),
        "text_encoder": randomised(UMT5EncoderModel(UMT5Config(**ENCODER)), 3),
        "vae": randomised(vae, 4),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }
    if kind == "ti2v":
        return WanImageToVideoPipeline(**parts, transformer=transformer(6, in_channels=4), expand_timesteps=True)
    if kind == "a14b":
        two = {name: transformer(seed, in_channels=12) for name, seed in (("transformer", 7), ("transformer_2", 8))}
        return WanImageToVideoPipeline(**parts, **two, boundary_ratio=0.9)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=8,
    )  # fmt: skip
    return WanImageToVideoPipeline(
        **parts,
        image_encoder=randomised(CLIPVisionModel(vision), 9),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        transformer=transformer(5, in_channels=12, image_dim=16, added_kv_proj_dim=12),
    )


class Recorded:
    """latents behind each step, and noise, of a pipeline's run."""

    def __init__(self, pipeline, module):
        self.steps, self.noise, step = [], [], pipeline.scheduler.step
        drawn = module.randn_tensor

        def stepped(*args, **more):
            found = step(*args, **more)
            self.steps.append(found[0].numpy().copy())
            return found

        def noise(*args, **more):
            self.noise.append(drawn(*args, **more))
            return self.noise[-1]

        pipeline.scheduler.step, module.randn_tensor = stepped, noise
        self.undo = lambda: setattr(module, "randn_tensor", drawn)


def write_films(folder: pathlib.Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    module = importlib.import_module(WanImageToVideoPipeline.__module__)
    module.ftfy = types.SimpleNamespace(fix_text=lambda text: text)  # which it takes without asking for it
    runs = {}
    image = picture((40, 56))
    for kind in ("i2v", "ti2v", "a14b"):
        pipeline = image_to_video(kind)
        place = folder if kind == "i2v" else folder / "more" / kind
        pipeline.save_pretrained(place)
        for component in () if kind == "i2v" else ("tokenizer", "text_encoder", "vae", "scheduler"):
            shutil.rmtree(place / component)
        recorded = Recorded(pipeline, module)
        second = {"guidance_scale_2": 3.0} if kind == "a14b" else {}
        with torch.no_grad():
            film = pipeline(
                image=Image.fromarray(image), prompt=PROMPT, negative_prompt=NEGATIVE, height=32, width=48,
                num_frames=5, num_inference_steps=STEPS, max_sequence_length=512, output_type="np",
                generator=torch.Generator().manual_seed(0), **second,
            )[0]  # fmt: skip
        recorded.undo()
        runs |= {f"{kind}/latents0": recorded.noise[0].numpy(), f"{kind}/steps": np.stack(recorded.steps, 1)}
        if kind != "a14b":
            runs[f"{kind}/output"] = film.astype(np.float16)
        print(kind, film.shape, film.std(), recorded.steps[-1].std())
    np.savez_compressed(folder / "run.npz", image=image, **runs)
    said = {"prompt": PROMPT, "negative": NEGATIVE, "steps": STEPS, "height": 32, "width": 48, "frames": 5,
            "tokens": 512}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(said, indent=1))
    print(f"{sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()):,} bytes")


# folder -> pipelines from image to image and of inpainting, and what is asked of them
IMAGES = {
    "flux_dev": ("FluxImg2ImgPipeline", "FluxInpaintPipeline", {"guidance_scale": 3.5, "max_sequence_length": 48}),
    "sd3": ("StableDiffusion3Img2ImgPipeline", None, {"max_sequence_length": 24}),
    "qwen_image": ("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", {"true_cfg_scale": 4.0}),
    "z_image": ("ZImageImg2ImgPipeline", "ZImageInpaintPipeline", {}),
}


def write_images(pipelines: pathlib.Path) -> None:
    runs = {}
    for name, (by_image, by_mask, call) in IMAGES.items():
        sides = json.loads((pipelines / name / "run.json").read_text())["call"]
        height, width = sides["height"], sides["width"]
        own = name == "z_image"  # which does not resize
        image = picture((height, width) if own else (height + 13, 2 * width + 7))
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[5 : height // 2 + 3, width // 2 :] = 255
        for kind, class_ in (("image", by_image), ("mask", by_mask)):
            if class_ is None:  # it takes networks of 16 channels alone
                continue
            pipeline = getattr(diffusers, class_).from_pretrained(pipelines / name)
            module = importlib.import_module(type(pipeline).__module__)
            module.retrieve_latents = lambda output, **_: output.latent_dist.mode()
            recorded, blended = Recorded(pipeline, module), []
            negative = {} if name == "flux_dev" else {"negative_prompt": NEGATIVE}
            more = {} if kind == "image" else {"mask_image": Image.fromarray(mask)}

            def behind(pipe, step, time, given, blended=blended):
                blended.append(given["latents"].numpy().copy())
                return {}

            with torch.no_grad():
                found = pipeline(
                    image=Image.fromarray(image), prompt=PROMPT, height=height, width=width, strength=0.75,
                    num_inference_steps=4, output_type="latent", generator=torch.Generator().manual_seed(0),
                    callback_on_step_end=behind, **more, **negative, **call,
                )[0]  # fmt: skip
            recorded.undo()
            runs |= {
                f"{name}/{kind}/noise": recorded.noise[0].numpy(),
                f"{name}/{kind}/steps": np.stack(blended, 1),
            }
            print(name, kind, len(blended), [n.shape for n in recorded.noise], np.shape(found))
        runs |= {f"{'small' if own else 'large'}/picture": image, f"{'small' if own else 'large'}/mask": mask}
    np.savez_compressed(HERE / "image_in.npz", **runs)
    print(f"{(HERE / 'image_in.npz').stat().st_size:,} bytes")


if __name__ == "__main__":
    write_films(HERE / "pipeline_wan_i2v")
    if len(sys.argv) > 1:
        write_images(pathlib.Path(sys.argv[1]))
