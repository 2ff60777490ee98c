"""Writes encoders.npz: what transformers' text encoders compute of tests/golden/encoder_cases.py.

Per case: `config` (the config.json that transformers writes, as text), `shapes` (names and shapes of its tensors, as
text), `states` [n + 1, B, L, D] (hidden_states), `last`, and where the class has them `pooled` and `projected`; weights
are made of a seed by name. Further `buckets`: T5's bucket of every distance from -300 to 300.

Needs torch 2.13 and transformers 5.24, no accelerator:

  python -m tests.golden.make_encoders
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    import torch
    import transformers
    from safetensors import safe_open
    from safetensors.numpy import save_file
    from transformers.models.t5.modeling_t5 import T5Attention

    from tests.golden.encoder_cases import CASES, kind_of, pixels, text, weights

    files: dict[str, np.ndarray] = {}
    for name, (kind, settings) in CASES.items():
        cls = getattr(transformers, kind)
        model = cls(cls.config_class(**settings))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            with safe_open(f"{folder}/model.safetensors", "np") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            save_file(weights(shapes), f"{folder}/model.safetensors", {"format": "pt"})
            config = json.loads(Path(folder, "config.json").read_text())
            model, info = cls.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"], (name, info)
        model = model.eval().float()
        with torch.no_grad():
            if kind_of(name) == "vision":
                out = model(torch.from_numpy(pixels().transpose(0, 3, 1, 2)), output_hidden_states=True)
            else:
                ids, mask = map(torch.from_numpy, text(name))
                given = {} if kind_of(name) == "clip" else {"attention_mask": mask}
                out = model(ids, output_hidden_states=True, **given)
        last = out.last_hidden_state if "last_hidden_state" in out else out.hidden_states[-1]
        found = {"states": torch.stack(out.hidden_states), "last": last}
        pooled = {"pooler_output": "pooled", "text_embeds": "projected", "image_embeds": "projected"}
        found |= {key: out[name_there] for name_there, key in pooled.items() if name_there in out}
        files |= {f"{name}.{key}": value.numpy().astype(np.float32) for key, value in found.items()}
        files[f"{name}.config"] = np.array(json.dumps(config))
        files[f"{name}.shapes"] = np.array(json.dumps(shapes))
    distances = torch.arange(-300, 301)
    files["buckets"] = T5Attention._relative_position_bucket(distances, True, 32, 128).numpy().astype(np.int8)
    path = Path(__file__).parent / "encoders.npz"
    np.savez_compressed(path, **files)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
