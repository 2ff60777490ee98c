"""Host memory of opening a published folder: a made-up FLUX of random bfloat16 in shards, opened by a process alone.

  python -m experiments.open_folder [--gib 4]

Prints, and keeps in experiments/results/open_folder/rows.jsonl, what the weights take, the largest tensor of the files,
the process's largest memory before and after they are read, and the seconds. On a CPU the device's memory is the
host's, so what counts is what the process took beyond the weights themselves. `--page` writes the page.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from difax.core.files import read_rows
from difax.core.writing import replacing
from experiments.provenance import RESULTS, append_row, provenance

SHARD = 2**29  # bytes of a file
ROWS = RESULTS / "open_folder" / "rows.jsonl"
CHILD = """
import json, sys, time
import difax
def peak():  # of this program: what getrusage tells begins with the memory of the process that started it
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
run = difax.load(sys.argv[1], model={"size": 16})
before, start = peak(), time.perf_counter()
params = run.prepared
from difax.core.qtensor import size_in_bytes
print(json.dumps({"weights": size_in_bytes(params), "before": before, "after": peak(),
                  "seconds": time.perf_counter() - start}))
"""
PAGE = """# Opening a folder

`python -m experiments.open_folder`: a made-up FLUX.1 in diffusers' layout, random bfloat16 in shards of {shard} MiB,
opened by `difax.load` and read for sampling, in a process of its own. {device}, jax {jax}, {date}. Beyond the weights:
the process's largest memory after reading less that before it, less the weights; on a CPU the weights themselves lie in
the host's memory.

| weights, MiB | largest tensor, MiB | beyond the weights, MiB | seconds |
|---|---|---|---|
{table}
"""


def make_folder(folder: pathlib.Path, gib: float) -> int:
    """Writes transformer/ of a FLUX of about that size; returns the bytes of its largest tensor."""
    import jax
    import ml_dtypes
    from flax.traverse_util import flatten_dict
    from safetensors.numpy import save_file

    from difax.models import flux
    from difax.models.flux_checkpoint import LAYOUTS

    bytes_of = lambda d, s: (36 * d + 15 * s) * 3072**2 * 2  # noqa: E731
    depth = max(1, round(gib * 2**30 / bytes_of(1, 1)))
    model = flux(double_depth=depth, single_depth=depth, size=16, dtype="bfloat16")
    spec: dict[str, Any] = dict(flatten_dict(jax.eval_shape(model.init, jax.random.key(0)), sep="/"))
    table, layers = LAYOUTS["diffusers"], {"double": depth, "single": depth}
    rng, largest, held, files = np.random.default_rng(0), 0, {}, []
    index: dict[str, str] = {}

    def flush() -> None:
        name = f"diffusion_pytorch_model-{len(files):05d}.safetensors"
        save_file(held, folder / name)
        files.append(name)
        index.update(dict.fromkeys(held, name))
        held.clear()

    for path, source in table.items():
        if path not in spec:
            continue
        shape = spec[path].shape
        by_layer = "{" in source.keys[0]
        shape = shape[1:] if by_layer else shape
        shares = source.widths or (1,) * len(source.keys)
        for layer in range(depth if by_layer else 1):
            for key, share in zip(source.keys, shares, strict=True):
                part = (*shape[:-1], shape[-1] * share // sum(shares))
                axes = source.axes or tuple(range(len(part)))
                own = [0] * len(part)
                for to, of in enumerate(axes):
                    own[of] = part[to]
                bits = rng.integers(0x3C00, 0x3C80, own, np.uint16)  # small numbers, all of them finite
                held[key.format(**dict.fromkeys(layers, layer))] = bits.view(ml_dtypes.bfloat16)
                largest = max(largest, bits.nbytes)
                if sum(a.nbytes for a in held.values()) > SHARD:
                    flush()
    flush()
    said = {"_class_name": "FluxTransformer2DModel", "num_layers": depth, "num_single_layers": depth}
    said |= {"guidance_embeds": True, "num_attention_heads": 24, "attention_head_dim": 128}
    (folder / "config.json").write_text(json.dumps(said))
    whole = {"metadata": {}, "weight_map": index}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(whole))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="of the weights (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="write the page from the rows")
    options = parser.parse_args()
    if not options.page:
        with tempfile.TemporaryDirectory() as folder:
            largest = make_folder(pathlib.Path(folder), options.gib)
            done = subprocess.run([sys.executable, "-c", CHILD, folder], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        found |= {"largest": largest, "beyond": found["after"] - found["before"] - found["weights"]}
        print({key: round(value / 2**20) if key != "seconds" else round(value, 1) for key, value in found.items()})
        append_row(ROWS, {**found, **provenance()})
    rows = read_rows(ROWS)
    mib = lambda row, key: f"{row[key] / 2**20:,.0f}"  # noqa: E731
    table = "\n".join(
        f"| {mib(r, 'weights')} | {mib(r, 'largest')} | {mib(r, 'beyond')} | {r['seconds']:.1f} |" for r in rows
    )
    last = {"device": rows[-1]["device"], "jax": rows[-1]["versions"]["jax"], "date": rows[-1]["date"]}
    with replacing(ROWS.with_name("README.md")) as aside:
        aside.write_text(PAGE.format(table=table, shard=SHARD // 2**20, **last))


if __name__ == "__main__":
    main()
