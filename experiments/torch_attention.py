"""The other side of `experiments.attention`: torch's SDPA, one call for each line on stdin. Needs `parity`.

python -m experiments.torch_attention TOKENS HEADS HEAD_WIDTH DTYPE
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from torch.nn.functional import scaled_dot_product_attention  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit(f"experiments.torch_attention needs the extra difax[parity]: {error}") from None
    tokens, heads, width = map(int, sys.argv[1:4])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, width).to(device, getattr(torch, sys.argv[4])) for _ in range(3))

    def step() -> tuple[float, float]:
        start, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            scaled_dot_product_attention(q, k, v)
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
