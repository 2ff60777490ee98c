"""Writes tiny pipelines as diffusers saves them, pipeline_pixart, pipeline_wan, pipeline_wan22 (two networks) and
pipeline_klein, each with run.npz: one run of diffusers on the CPU in float32, its prompts, token ids, the first
latents, those behind each step, and the pictures. Random weights; norms and gates are random too.

  python tests/golden/make_pipelines.py [NAME ...]        (torch 2.13.0, diffusers 0.42.1, transformers 5.24.0)
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

HERE = pathlib.Path(__file__).resolve().parent
PROMPTS = ["a red fox jumps over 3 logs", "two cats on a bicycle"]
NEGATIVE = "blurry"


def tokenizer(folder: pathlib.Path) -> PreTrainedTokenizerFast:
    """A Unigram of letters and some words, with T5's special tokens."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,!?"]
    pieces += [(f"▁{word}", -3.0 - i / 10) for i, word in enumerate("a the on over red fox cat cats two logs".split())]
    made = Tokenizer(Unigram(pieces, unk_id=2))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(left=False, right=True)])
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    made.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


CHAT = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def bytewise() -> PreTrainedTokenizerFast:
    """Qwen's kind: bytes, one pair of them merged, and tokens of a chat."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(BPE({piece: i for i, piece in enumerate([*letters, "Ġa"])}, [("Ġ", "a")]))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=CHAT,
        additional_special_tokens=["<|im_start|>", "<think>", "</think>"], model_max_length=512,
    )  # fmt: skip


def randomised(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Parameters of a size at which every one of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        norm = "norm" in name and parameter.ndim == 1 and name.endswith("weight") or name.endswith("gamma")
        scale = 0.1 if norm or parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = (1.0 + 0.1 * noise) if norm else scale * noise
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.data = 0.5 + torch.rand(buffer.shape, generator=generator)
    return module.eval()


ENCODER = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 64,
           "feed_forward_proj": "gated-gelu"}  # fmt: skip


def pixart() -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=16, caption_channels=16, patch_size=2, use_additional_conditions=False,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=0.13025,
    )  # fmt: skip
    return PixArtSigmaPipeline(
        tokenizer=tokenizer(HERE),
        text_encoder=randomised(T5EncoderModel(T5Config(**ENCODER)), 0),
        vae=randomised(vae, 1),
        transformer=randomised(transformer, 2),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    )


def wan_network(seed: int) -> WanTransformer3DModel:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=2,
    )  # fmt: skip
    return randomised(transformer, seed)


def wan(**more) -> WanPipeline:
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.1, 0.9, 1.0, 1.2],
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(
        tokenizer=tokenizer(HERE),
        text_encoder=randomised(UMT5EncoderModel(UMT5Config(**ENCODER)), 3),
        vae=randomised(vae, 4),
        transformer=wan_network(5),
        scheduler=scheduler,
        **more,
    )


def wan22() -> WanPipeline:
    """Wan 2.2's two networks: of three steps at shift 3 (999, 857, 599) the first is made with the first."""
    return wan(transformer_2=wan_network(6), boundary_ratio=0.875)


def klein() -> Flux2KleinPipeline:
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=32, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    # of 28 layers, since the states of 9, 18 and 27 are taken
    encoder = Qwen3Config(
        vocab_size=262, hidden_size=8, intermediate_size=8, num_hidden_layers=28, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, tie_word_embeddings=True, rope_theta=1e6,
    )  # fmt: skip
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=randomised(vae, 7),
        text_encoder=randomised(Qwen3ForCausalLM(encoder), 8),
        tokenizer=bytewise(),
        transformer=randomised(transformer, 9),
    )


CALLS = {
    "pixart": (pixart, {"height": 16, "width": 24, "use_resolution_binning": False, "clean_caption": False,
                        "max_sequence_length": 24}),
    "wan": (wan, {"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": 24}),
    "wan22": (wan22, {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 24, "guidance_scale": 4.0,
                      "guidance_scale_2": 3.0}),
    "klein": (klein, {"height": 16, "width": 24, "max_sequence_length": 64}),
}  # fmt: skip


def write(name: str) -> None:
    make, call = CALLS[name]
    pipeline, folder = make(), HERE / f"pipeline_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder)
    run: dict[str, np.ndarray] = {}
    step, prepare = pipeline.scheduler.step, pipeline.prepare_latents
    latents: list[np.ndarray] = []

    def stepped(*args, **more):
        found = step(*args, **more)
        latents.append(found[0].numpy().copy())
        return found

    def prepared(*args, **more):
        found = prepare(*args, **more)
        run["latents0"] = (found[0] if isinstance(found, tuple) else found).numpy().copy()
        return found

    pipeline.scheduler.step, pipeline.prepare_latents = stepped, prepared
    with torch.no_grad():
        images = pipeline(
            prompt=PROMPTS, num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0), **call,
            **({} if name == "klein" else {"negative_prompt": NEGATIVE if name == "pixart" else [NEGATIVE] * 2}),
        )[0]  # fmt: skip
    run |= {"steps": np.stack(latents, 1), "output": images.astype(np.float32)}
    ids = pipeline.tokenizer(PROMPTS, padding="max_length", max_length=24, truncation=True, return_tensors="np")[
        "input_ids"
    ]
    np.savez_compressed(folder / "run.npz", ids=ids.astype(np.int32), **run)
    (folder / "run.json").write_text(
        json.dumps(
            {"prompts": PROMPTS, "negative": None if name == "klein" else NEGATIVE, "steps": 3, **call}, indent=1
        )
    )
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    print(f"{folder.name}: {size:,} bytes, {images.shape}, std {images.std():.3f}, latents {latents[-1].std():.3f}")


if __name__ == "__main__":
    for name in sys.argv[1:] or CALLS:
        write(name)
