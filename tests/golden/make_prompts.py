"""Writes prompts.npz: what diffusers' encode_prompt makes of a batch, with encoders whose states tell the ids.

Per pipeline P and call n (0 the prompts, 1 the negative ones): `P/ids/ENCODER/n` and, where the encoder was given one,
`P/mask/ENCODER/n`; and `P/out/i`, the i-th array that encode_prompt returned, rows of lists by `P/out/i/row`. Encoders
are stand-ins whose states are `state`, `pooled` and `projected` of the ids, so that every row can be told from every
other; tokenizers are those of tokenizers.json; max_sequence_length is the default of the pipeline's __call__.

Needs torch 2.13, diffusers 0.42.1, transformers 5.24 and sentencepiece:

  python -m tests.golden.make_prompts
"""

from __future__ import annotations

import base64
import inspect
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

PROMPTS = [
    "A photo of a red fox, jumping over 3 logs at dawn!",
    "  UPPER &amp;amp; lower  café\t{braces} ",
    "the quick brown fox jumps over the lazy dog " * 60,
]
NEGATIVE = ["blurry, low quality", "", "a"]
DEPTH = 30  # blocks of every stand-in
TEMPLATE = (  # what Qwen3's own makes of one message
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + "
    "'\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)

# pipeline -> kinds of its tokenizers, in tokenizers.json
CASES = {
    "FluxPipeline": ("clip", "t5"),
    "StableDiffusion3Pipeline": ("clip", "clip, padded by an exclamation mark", "t5"),
    "PixArtAlphaPipeline": ("t5",),
    "PixArtSigmaPipeline": ("t5",),
    "WanPipeline": ("umt5",),
    "WanImageToVideoPipeline": ("umt5",),
    "QwenImagePipeline": ("qwen2",),
    "ZImagePipeline": ("qwen2",),
    "Flux2KleinPipeline": ("qwen2",),
    "StableDiffusionPipeline": ("clip",),
    "StableDiffusionXLPipeline": ("clip", "clip, padded by an exclamation mark"),
    "HunyuanVideoPipeline": ("qwen2", "clip"),
    "CogVideoXPipeline": ("t5",),
    "LTXPipeline": ("t5",),
    "MochiPipeline": ("t5",),
    "SanaPipeline": ("t5",),
    "Lumina2Pipeline": ("t5",),
    "HunyuanDiTPipeline": ("bert", "umt5"),
}
LOADERS = {
    "clip": "CLIPTokenizer",
    "t5": "T5Tokenizer",
    "umt5": "T5Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "bert": "BertTokenizer",
}
PROJECTED = {"StableDiffusion3Pipeline": (1, 2), "StableDiffusionXLPipeline": (2,)}  # encoders with a projection


def state(ids: np.ndarray, number: int, encoder: str) -> np.ndarray:
    """State `number` [B, L, 2] of tokens, the third encoder's [B, L, 5]: the id, its place and the state's number."""
    place = np.broadcast_to(np.arange(ids.shape[1]) + 1000 * number, ids.shape)
    columns = [ids, place, ids + 1, place + 1, ids + 2][: 5 if encoder.endswith("_3") else 2]
    return np.stack(columns, -1).astype(np.float32)


def pooled(ids: np.ndarray) -> np.ndarray:
    return np.stack([ids.sum(1), ids[:, 0]], -1).astype(np.float32)


def projected(ids: np.ndarray) -> np.ndarray:
    return np.stack([ids.sum(1) + 1, ids[:, 0], ids[:, 1]], -1).astype(np.float32)


def main() -> None:
    import diffusers
    import torch
    import transformers

    stored = json.loads(Path(__file__).with_name("tokenizers.json").read_text(encoding="utf-8"))["cases"]
    out: dict[str, np.ndarray] = {}

    def tokenizer(kind: str) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in stored[kind]["files"].items():
                raw = base64.b64decode(text[7:]) if text.startswith("base64:") else text.encode()
                (Path(folder) / name).write_bytes(raw)
            made = getattr(transformers, LOADERS[kind.split(",")[0]]).from_pretrained(folder)
        made.chat_template = TEMPLATE
        return made

    class States:
        def __init__(self, ids: np.ndarray, encoder: str):
            self.ids, self.encoder = ids, encoder

        def __getitem__(self, number: int) -> Any:
            return torch.from_numpy(state(self.ids, number % (DEPTH + 1), self.encoder))

    class Given(SimpleNamespace):
        def __getitem__(self, index: int) -> Any:
            return self.first

    def encoder(name: str, folder: str, projects: bool) -> Any:
        calls = 0

        def call(input_ids: Any, attention_mask: Any = None, **_: Any) -> Any:
            nonlocal calls
            ids = input_ids.numpy()
            out[f"{name}/ids/{folder}/{calls}"] = ids.astype(np.int32)
            if attention_mask is not None:
                out[f"{name}/mask/{folder}/{calls}"] = attention_mask.numpy().astype(np.int32)
            calls += 1
            last, to = States(ids, folder)[-1], torch.from_numpy
            return Given(
                first=to(projected(ids)) if projects else last,
                last_hidden_state=last,
                hidden_states=States(ids, folder),
                pooler_output=to(pooled(ids)),
            )

        class Encoder(torch.nn.Module):
            dtype, device, config = torch.float32, torch.device("cpu"), SimpleNamespace()

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return call(*args, **kwargs)

        return Encoder()

    for name, kinds in CASES.items():
        cls = getattr(diffusers, name)

        class Bare(cls):
            """The pipeline without its networks."""

            _execution_device = torch.device("cpu")
            config = SimpleNamespace(
                force_zeros_for_empty_prompt=name == "StableDiffusionXLPipeline", is_distilled=False
            )
            transformer = unet = None

            def __init__(self) -> None:
                pass

            def __getattr__(self, key: str) -> Any:
                raise AttributeError(key)

        pipe = Bare()
        pipe.tokenizer_max_length = 77
        for i, kind in enumerate(kinds, 1):
            last = "" if i == 1 else f"_{i}"
            projects = i in PROJECTED.get(name, ())
            object.__setattr__(pipe, f"tokenizer{last}", tokenizer(kind))
            object.__setattr__(pipe, f"text_encoder{last}", encoder(name, f"text_encoder{last}", projects))
        if name == "WanImageToVideoPipeline":  # it calls ftfy even where that is not installed
            inspect.getmodule(cls).ftfy = SimpleNamespace(fix_text=lambda text: text)
        source = inspect.getsource(cls.__init__)
        if name == "QwenImagePipeline":
            lines = [line.strip() for line in source.splitlines()]
            for line in lines:
                if line.startswith(("self.prompt_template_encode", "self.tokenizer_max_length")):
                    exec(line, {"self": pipe})
        if name == "Lumina2Pipeline":
            pipe.system_prompt = next(s for s in source.split('"') if s.startswith("You are an assistant"))
        takes, call = inspect.signature(cls.encode_prompt).parameters, inspect.signature(cls.__call__).parameters
        more: dict[str, Any] = {key: None for key in ("prompt_2", "prompt_3") if key in takes}
        more |= {"prompt": list(PROMPTS), "device": "cpu"}
        for key in ("max_sequence_length", "clean_caption", "complex_human_instruction"):
            if key in takes and key in call:
                more[key] = call[key].default
        if "do_classifier_free_guidance" in takes:
            more |= {"do_classifier_free_guidance": True, "negative_prompt": list(NEGATIVE)}
        if "num_images_per_prompt" in takes:
            more["num_images_per_prompt"] = 1
        more.pop("complex_human_instruction", None) if name != "SanaPipeline" else None
        runs = [more]
        if name == "HunyuanDiTPipeline":
            runs = [more | {"text_encoder_index": i, "max_sequence_length": m} for i, m in ((0, 77), (1, 256))]
        if name in ("QwenImagePipeline", "Flux2KleinPipeline"):
            runs = [more, more | {"prompt": list(NEGATIVE)}]
        made: list[Any] = []
        for arguments in runs:
            result = pipe.encode_prompt(**arguments)
            made += result if isinstance(result, tuple) else (result,)
        for i, array in enumerate(made):
            if isinstance(array, list):
                for row, of in enumerate(array):
                    out[f"{name}/out/{i}/{row}"] = of.numpy()
            elif array is not None:
                out[f"{name}/out/{i}"] = array.numpy().astype(np.int32 if array.dtype == torch.bool else None)
    file = Path(__file__).with_name("prompts.npz")
    np.savez_compressed(
        file, **{k: v.astype(np.float32) if v.dtype.kind == "f" else v.astype(np.int32) for k, v in out.items()}
    )
    print(file, file.stat().st_size, len(out))


if __name__ == "__main__":
    main()
