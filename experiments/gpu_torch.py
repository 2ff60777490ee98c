"""The other side of the suite's part `models`: DiT and FLUX blocks in torch, one line of JSON answered by another.

  python -m experiments.gpu_torch < REQUESTS

A request is {"model": "dit XL/2" | "double" | "single", "batch": B, "calls": N, "compile": true}; the answer is
{"seconds"} of one of N calls, or {"error"}. A model is made when it is first asked for: `torch.compile` of each block
(equal blocks share one compilation), and on a GPU the whole forward pass recorded as one CUDA graph ("graph"), so that
no launch is waited for. Written by us from the papers, with `scaled_dot_product_attention`, in bf16: diffusers is
on no image that the suite is made for. Weights are random and their own: seconds alone are compared.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

from experiments.bounded import end_with_parent

SIZES = {"XL/2": (28, 1152, 16, 2), "toy": (2, 64, 2, 8)}  # depth, width, heads, patch
FLUX = {"width": 3072, "heads": 24, "text": 512, "image": 4096}
TOY_FLUX = {"width": 128, "heads": 2, "text": 16, "image": 64}


def models(torch: Any) -> dict[str, Callable[..., Any]]:
    """Makers of modules; torch is handed in, since a machine may be without it."""
    nn, functional = torch.nn, torch.nn.functional

    def modulated(x: Any, shift: Any, scale: Any) -> Any:
        return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def attend(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    class Block(nn.Module):
        def __init__(self, width: int, heads: int):
            super().__init__()
            self.heads = heads
            self.ada, self.qkv, self.out = (nn.Linear(width, n * width) for n in (6, 3, 1))
            self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, h: Any, c: Any) -> Any:
            s1, c1, g1, s2, c2, g2 = self.ada(c).chunk(6, -1)
            q, k, v = self.qkv(modulated(h, s1, c1)).unflatten(-1, (3, self.heads, -1)).unbind(2)
            h = h + g1[:, None] * self.out(attend(q, k, v))
            hidden = functional.gelu(self.fc1(modulated(h, s2, c2)), approximate="tanh")
            return h + g2[:, None] * self.fc2(hidden)

    class DiT(nn.Module):
        def __init__(self, depth: int, width: int, heads: int, patch: int):
            super().__init__()
            self.patch = patch
            self.embed = nn.Linear(4 * patch * patch, width)
            self.time1, self.time2 = nn.Linear(256, width), nn.Linear(width, width)
            self.label = nn.Embedding(1001, width)
            self.position = nn.Parameter(torch.randn(1, (32 // patch) ** 2, width))
            self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
            self.ada, self.out = nn.Linear(width, 2 * width), nn.Linear(width, 8 * patch * patch)

        def forward(self, x: Any, t: Any, label: Any) -> Any:
            b, _, rows, columns = x.shape
            p = self.patch
            tokens = x.reshape(b, 4, rows // p, p, columns // p, p).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
            h = self.embed(tokens) + self.position
            angle = t[:, None] * torch.exp(-math.log(1e4) * torch.arange(128, device=x.device) / 128)
            features = torch.cat([angle.cos(), angle.sin()], -1).to(x.dtype)
            c = functional.silu(self.time2(functional.silu(self.time1(features))) + self.label(label))
            for block in self.blocks:
                h = block(h, c)
            return self.out(modulated(h, *self.ada(c).chunk(2, -1)))

    def turned(x: Any, cos: Any, sin: Any) -> Any:
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)

    class Heads(nn.Module):
        def __init__(self, heads: int, head: int):
            super().__init__()
            self.heads = heads
            self.q_scale, self.k_scale = nn.Parameter(torch.ones(head)), nn.Parameter(torch.ones(head))

        def forward(self, qkv: Any) -> Any:
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
            norm = lambda a, s: functional.rms_norm(a.float(), a.shape[-1:], s.float(), 1e-6).to(v.dtype)  # noqa: E731
            return norm(q, self.q_scale), norm(k, self.k_scale), v

    class Stream(nn.Module):
        def __init__(self, width: int, heads: int):
            super().__init__()
            self.ada, self.qkv, self.out = (nn.Linear(width, n * width) for n in (6, 3, 1))
            self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.split = Heads(heads, width // heads)

        def after(self, h: Any, o: Any, mods: Any) -> Any:
            h = h + mods[2][:, None] * self.out(o)
            hidden = functional.gelu(self.fc1(modulated(h, mods[3], mods[4])), approximate="tanh")
            return h + mods[5][:, None] * self.fc2(hidden)

    class Double(nn.Module):
        def __init__(self, width: int, heads: int):
            super().__init__()
            self.txt, self.img = Stream(width, heads), Stream(width, heads)

        def forward(self, txt: Any, img: Any, c: Any, cos: Any, sin: Any) -> Any:
            of = [s.ada(c).chunk(6, -1) for s in (self.txt, self.img)]
            pairs = [
                s.split(s.qkv(modulated(h, m[0], m[1])))
                for s, h, m in zip((self.txt, self.img), (txt, img), of, strict=True)
            ]
            q, k, v = (torch.cat(pair, 1) for pair in zip(*pairs, strict=True))
            o = attend(turned(q, cos, sin), turned(k, cos, sin), v)
            cut = txt.shape[1]
            return self.txt.after(txt, o[:, :cut], of[0]), self.img.after(img, o[:, cut:], of[1])

    class Single(nn.Module):
        def __init__(self, width: int, heads: int):
            super().__init__()
            self.width = width
            self.ada, self.linear1 = nn.Linear(width, 3 * width), nn.Linear(width, 7 * width)
            self.linear2, self.split = nn.Linear(5 * width, width), Heads(heads, width // heads)

        def forward(self, txt: Any, img: Any, c: Any, cos: Any, sin: Any) -> Any:
            shift, scale, gate = self.ada(c).chunk(3, -1)
            h = torch.cat([txt, img], 1)
            qkv, hidden = self.linear1(modulated(h, shift, scale)).split([3 * self.width, 4 * self.width], -1)
            q, k, v = self.split(qkv)
            o = attend(turned(q, cos, sin), turned(k, cos, sin), v)
            h = h + gate[:, None] * self.linear2(torch.cat([o, functional.gelu(hidden, approximate="tanh")], -1))
            return h[:, : txt.shape[1]], h[:, txt.shape[1] :]

    return {"dit": DiT, "double": Double, "single": Single}


def made(torch: Any, model: str, batch: int, compiled: bool, toy: bool) -> tuple[Callable[[], Any], bool]:
    """A call of a model of that name on random inputs, warm, and whether it is one CUDA graph."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, variant = model.partition(" ")
    random = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)  # noqa: E731
    with torch.device(device):
        if kind == "dit":
            module = models(torch)["dit"](*SIZES[variant])
            label = torch.arange(batch, device=device)
            arguments = (random(batch, 4, 32, 32), torch.full((batch,), 500.0, device=device), label)
        else:
            c = TOY_FLUX if toy else FLUX
            width, heads, text, image = c["width"], c["heads"], c["text"], c["image"]
            module = models(torch)[kind](width, heads)
            angle = torch.randn(text + image, 1, width // heads // 2, device=device)
            tokens = (random(batch, text, width), random(batch, image, width), random(batch, width))
            arguments = (*tokens, angle.cos(), angle.sin())
    module = module.to(torch.bfloat16).eval().requires_grad_(False)
    for block in (getattr(module, "blocks", None) or [module]) if compiled else []:
        block.compile(dynamic=False)

    def call() -> Any:
        with torch.inference_mode():
            return module(*arguments)

    for _ in range(3):
        call()
    if device == "cpu":
        return call, False
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # recorded calls must have run on such a stream before
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        print(f"no CUDA graph of {model}: {error}", file=sys.stderr)
        return call, False
    return graph.replay, True


def main() -> None:
    end_with_parent()
    calls: dict[Any, tuple[Callable[[], Any], bool]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            import torch  # pyright: ignore[reportMissingImports]

            torch.set_float32_matmul_precision("high")
            wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
            key = request["model"], request["batch"], request["compile"]
            if key not in calls:
                calls[key] = made(torch, *key, toy=request["toy"])
            call, graph = calls[key]
            wait()
            start = time.perf_counter()
            for _ in range(request["calls"]):
                call()
            wait()
            seconds = (time.perf_counter() - start) / request["calls"]
            answer = {"seconds": seconds, "torch": torch.__version__, "graph": graph}
        except Exception as error:  # told to the part, where it is the row of this variant
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
