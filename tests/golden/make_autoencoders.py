"""Writes autoencoders.safetensors: tiny autoencoders of diffusers, and what they decode and encode; the same in tiles.

Every model is filled with random weights (norms and running statistics too). Of each the file holds
`<name>/weights/<tensor>`, `<name>/latents` [B, C, h, w] as a denoiser of its pipelines has them, `<name>/decoded`,
`<name>/pixels` and `<name>/encoded`; its metadata holds each config. autoencoders_tiled.safetensors has the like for
larger latents and pixels, `<name>/tiled_latents` and so on, computed tile by tile, and of Wan's of pipeline_wan.
diffusers' own converter has to turn the weights under their original names (`original_name`) back into its own, or
nothing is written.

Needs torch 2.13, diffusers 0.42.1 and safetensors:

  python -m tests.golden.make_autoencoders
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
# name -> class, arguments; latents and pixels are rows x columns
KL = dict(norm_num_groups=2, sample_size=32)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "kl": ("AutoencoderKL", KL | dict(block_out_channels=(4, 4, 6), layers_per_block=2, scaling_factor=0.18215)),
    "kl_shift": (
        "AutoencoderKL",
        KL
        | dict(
            sample_size=16,
            block_out_channels=(4, 4),
            latent_channels=6,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
            force_upcast=False,
        ),
    ),
    "kl_means": (
        "AutoencoderKL",
        KL
        | dict(
            block_out_channels=(4, 6),
            latent_channels=3,
            scaling_factor=0.5,
            latents_mean=(-1.6, 2.2, 0.1),
            latents_std=(8.4, 5.9, 3.0),
            use_quant_conv=False,
            mid_block_add_attention=False,
        ),
    ),
    "kl_one": ("AutoencoderKL", KL | dict(block_out_channels=(4,), in_channels=4, out_channels=4)),
    "flux2": (
        "AutoencoderKLFlux2",
        KL
        | dict(
            block_out_channels=(4, 4, 6),
            decoder_block_out_channels=(2, 4, 4),
            latent_channels=3,
            layers_per_block=1,
            batch_norm_eps=0.01,
        ),
    ),
    "tiny": (
        "AutoencoderTiny",
        dict(
            encoder_block_out_channels=(5, 5, 5),
            decoder_block_out_channels=(4, 4, 4),
            num_encoder_blocks=(1, 2, 1),
            num_decoder_blocks=(2, 1, 1),
        ),
    ),
    "tiny_mish": (
        "AutoencoderTiny",
        dict(
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=6,
            act_fn="mish",
            scaling_factor=0.7,
            shift_factor=0.2,
        ),
    ),
}
for _types, _of in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
    for _kind, _config in CASES.values():
        if _kind != "AutoencoderTiny":
            _config[_types] = (_of,) * len(_config["block_out_channels"])
PALER = 0.125
SIZE = (3, 4)  # of the latents
TILED = {"kl_shift": (13, 10), "flux2": (7, 4)}


def original_name(name: str, levels: int, flux2: bool) -> str:
    """The name in latent diffusion, or in Black Forest Labs' files, of a tensor of diffusers."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
    name = re.sub(r"to_([qkv])\.", r"\1.", name).replace("to_out.0", "proj_out")
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    if flux2:
        name = re.sub(r"^quant_conv", "encoder.quant_conv", re.sub(r"^post_quant", "decoder.post_quant", name))
    return name


def main() -> None:
    import diffusers
    import torch
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
    from safetensors.torch import save_file

    torch.set_grad_enabled(False)
    files: dict[str, Any] = {}
    configs: dict[str, str] = {}
    for seed, (name, (kind, arguments)) in enumerate(CASES.items()):
        rng = np.random.default_rng(seed)
        vae = getattr(diffusers, kind)(**arguments).eval()
        for key, p in sorted(vae.state_dict().items()):
            if key.endswith("num_batches_tracked"):
                continue
            norm = "norm" in key and key.endswith("weight")
            std = 0.3 if norm else 0.2 if p.ndim == 1 else p[0].numel() ** -0.5
            values = rng.normal(float(norm), std, p.shape)
            p.copy_(torch.from_numpy(np.exp(values) if key.endswith("running_var") else values))
        config = dict(vae.config) | {"_class_name": kind}
        configs[name] = json.dumps({k: v for k, v in config.items() if k != "_name_or_path"})
        state = {k: v.clone().contiguous() for k, v in vae.state_dict().items()}
        if kind == "AutoencoderKL":
            linear = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight")
            theirs = {original_name(k, len(arguments["block_out_channels"]), False): v for k, v in state.items()}
            theirs = {k: v[..., None, None] if linear.search(k) else v for k, v in theirs.items()}
            back = convert_ldm_vae_checkpoint(dict(theirs), {**config})
            assert back.keys() == state.keys(), sorted(back.keys() ^ state.keys())
            assert all(torch.equal(back[k], state[k]) for k in state)
        c = vae.config

        def to_decoder(z, kind=kind, c=c, vae=vae):
            """Latents as the pipelines hand them to `vae.decode`."""
            if kind == "AutoencoderKLFlux2":
                std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + c.batch_norm_eps)
                return Flux2Pipeline._unpatchify_latents(z * std + vae.bn.running_mean.view(1, -1, 1, 1))
            if kind == "AutoencoderKL" and c.latents_mean is not None:
                mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (c.latents_mean, c.latents_std))
                return z * std / c.scaling_factor + mean
            return z / c.scaling_factor + (c.shift_factor or 0.0)

        def encoded(x, kind=kind, c=c, vae=vae):
            """Latents as the pipelines make them of the mean."""
            z = vae.encode(x).latents if kind == "AutoencoderTiny" else vae.encode(x).latent_dist.mode()
            if kind == "AutoencoderKLFlux2":
                std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + c.batch_norm_eps)
                return (Flux2Pipeline._patchify_latents(z) - vae.bn.running_mean.view(1, -1, 1, 1)) / std
            if kind == "AutoencoderKL" and c.latents_mean is not None:
                mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (c.latents_mean, c.latents_std))
                return (z - mean) * c.scaling_factor / std
            return (z - (c.shift_factor or 0.0)) * c.scaling_factor

        flux2 = kind == "AutoencoderKLFlux2"
        levels = len(c.num_encoder_blocks if kind == "AutoencoderTiny" else c.block_out_channels)
        side, channels = 2 ** (levels - 1 + flux2), c.latent_channels * (4 if flux2 else 1)
        for tiles, (h, w) in (("", SIZE), ("tiled_", TILED.get(name))):
            if tiles:
                vae.enable_tiling()
            z = torch.from_numpy(rng.normal(size=(1, channels, h, w)).astype(np.float32))
            x = torch.from_numpy(rng.uniform(-1, 1, (len(z), c.in_channels, side * h, side * w)).astype(np.float32))
            files[f"{name}/{tiles}latents"], files[f"{name}/{tiles}pixels"] = z, x
            files[f"{name}/{tiles}decoded"] = vae.decode(to_decoder(z)).sample
            files[f"{name}/{tiles}encoded"] = encoded(x)
            if name not in TILED:
                break
        files |= {f"{name}/weights/{k}": v for k, v in state.items()}
        out = files[f"{name}/decoded"]
        print(
            f"{name}: {sum(v.numel() for v in state.values())} weights, decoded {tuple(out.shape)} std {out.std():.3f}"
        )
    # Wan's, of the tiny pipeline beside this file: one frame, in tiles of 4 latents every 3, and paler, so that nothing
    # is clipped, which the reference does behind the mixing
    rng = np.random.default_rng(100)
    vae = diffusers.AutoencoderKLWan.from_pretrained(HERE / "pipeline_wan" / "vae").eval()
    vae.enable_tiling(32, 32, 24, 24)
    for p in vae.decoder.conv_out.parameters():
        p.mul_(PALER)
    z = torch.from_numpy(rng.normal(size=(1, 4, 1, 7, 6)).astype(np.float32))
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    decoded = vae.decode(z * std + mean).sample
    assert decoded.abs().max() < 1
    files |= {"wan/tiled_latents": z[:, :, 0], "wan/tiled_decoded": decoded[:, :, 0]}
    print(f"wan: decoded {tuple(decoded.shape)} std {decoded.std():.3f}")
    for tiled, path in ((False, HERE / "autoencoders.safetensors"), (True, HERE / "autoencoders_tiled.safetensors")):
        some = {k: v.contiguous() for k, v in files.items() if ("/tiled_" in k) == tiled}
        save_file(some, path, None if tiled else configs)
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
