"""The other side of `experiments.bench_step`: diffusers' DiT, one step for each line on stdin. Needs `parity`.

python -m experiments.torch_step VARIANT BATCH DTYPE eager|compile WEIGHTS_OUT
"""

from __future__ import annotations

import json
import sys
import time

DEPTH_HEADS = {"S": (12, 6), "B": (12, 12), "L": (24, 16), "XL": (28, 16)}
HEAD_WIDTH = {"S": 64, "B": 64, "L": 64, "XL": 72}


def main() -> None:
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from diffusers import DiTTransformer2DModel  # pyright: ignore[reportMissingImports]
        from safetensors.torch import save_file
    except ImportError as error:
        raise SystemExit(f"experiments.torch_step needs the extra difax[parity]: {error}") from None
    variant, count, dtype, mode, weights = sys.argv[1:]
    batch = int(count)
    size, patch = variant.split("/")
    depth, heads = DEPTH_HEADS[size]
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD_WIDTH[size],
        in_channels=4,
        out_channels=8,
        num_layers=depth,
        sample_size=32,
        patch_size=int(patch),
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
    ).eval()
    # the embedders inside the blocks are copies of one in every published checkpoint
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, weights)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device, getattr(torch, dtype))
    run = torch.compile(model) if mode == "compile" else model
    x = torch.randn(batch, 4, 32, 32, dtype=getattr(torch, dtype), device=device)
    t = torch.full((batch,), 500, device=device)
    label = torch.arange(batch, device=device)

    def step() -> tuple[float, float]:
        start, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            run(x, timestep=t, class_labels=label)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, time.process_time() - cpu

    warm = step()[0] + step()[0]
    print(json.dumps({"warm_up_seconds": warm, "torch": torch.__version__}), flush=True)
    for _ in sys.stdin:
        seconds, cpu_seconds = step()
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}), flush=True)


if __name__ == "__main__":
    main()
