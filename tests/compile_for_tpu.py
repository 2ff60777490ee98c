"""Compiles the TPU kernel for chips that are not there: `python -m tests.compile_for_tpu v5e:2x4`.

A process of its own, since libtpu reads its environment once. Needs libtpu. Prints one line of JSON a variant:
its name, and "ok" or what the compiler said.
"""

import json
import os
import sys
from functools import partial

VARIANTS = {
    # name: (tokens, head width, block_q, block_k, q and k, options)
    "bf16": (4608, 128, 128, 128, "bfloat16", {}),
    "bf16 segments": (4608, 128, 128, 128, "bfloat16", {"segmented": True}),
    "bf16 ragged": (4600, 128, 128, 128, "bfloat16", {}),
    "bf16 width 64": (4608, 64, 128, 128, "bfloat16", {}),
    "bf16 64 x 64 segments ragged": (4600, 64, 64, 64, "bfloat16", {"segmented": True}),
    "bf16 256 x 128": (4608, 128, 256, 128, "bfloat16", {}),
    "bf16 copied": (4608, 128, 128, 128, "bfloat16", {"resident": False}),
    "bf16 copied 64 x 64 segments ragged": (4600, 64, 64, 64, "bfloat16", {"segmented": True, "resident": False}),
    "bf16 32k": (32768, 128, 128, 128, "bfloat16", {}),
    "bf16 75k": (75776, 128, 128, 128, "bfloat16", {}),
    "f32": (1024, 128, 128, 128, "float32", {}),
    "int8": (4608, 128, 128, 128, "int8", {}),
    "int8 copied ragged segments": (4600, 128, 128, 128, "int8", {"segmented": True, "resident": False}),
    "int8 fp8": (4608, 128, 128, 128, "int8", {"values": "float8_e4m3fn"}),
    "sharded": (1024, 128, 128, 128, "bfloat16", {}),
}


def main(topology: str, *names: str) -> None:
    os.environ.update(
        JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-8",
        TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )  # fmt: skip
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from difax.accel.kernels.tpu_attention import block_sparse
    from difax.core.contracts import BlockScales, Segments
    from difax.core.target import lowering_for, target_of

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    for name in names or VARIANTS:
        t, width, block_q, block_k, kind, options = VARIANTS[name]
        many = 4 if name == "sharded" else 1
        mesh = Mesh(np.array(devices[:many]), ("heads",), axis_types=(AxisType.Auto,))

        def of(shape, dtype, *axes, mesh=mesh):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

        h, n_q, n_k = 4, -(-t // block_q), -(-t // block_k)
        values = options.get("values", "bfloat16" if kind == "int8" else kind)
        x, v = of((1, t, h, width), kind, None, None, "heads"), of((1, t, h, width), values, None, None, "heads")
        listed = of((1, h, n_q, n_k // 3), jnp.int32, None, "heads"), of((1, h, n_q), jnp.int32, None, "heads")
        scales = segments = None
        if kind == "int8":
            per = of((1, h, width), jnp.float32) if "values" in options else None
            scales = BlockScales(of((1, h, n_q), jnp.float32), of((1, h, n_k), jnp.float32), per, block_q, block_k)
        if options.get("segmented"):
            segments = Segments(of((1, t), jnp.int32), of((1, t), jnp.int32))

        def attend(q, k, v, listed, segments, scales, options=options, block_q=block_q, block_k=block_k, width=width):
            return block_sparse(
                q, k, v, *listed, block_q=block_q, block_k=block_k, softmax_scale=width**-0.5, segments=segments,
                scales=scales, resident=options.get("resident"),
            )  # fmt: skip

        run = attend
        if many > 1:
            tokens, rows = PartitionSpec(None, None, "heads"), PartitionSpec(None, "heads")
            run = jax.shard_map(
                lambda q, k, v, listed: attend(q, k, v, listed, None, None),
                mesh=mesh, in_specs=(tokens, tokens, tokens, rows), out_specs=(tokens, rows),
            )  # fmt: skip
            run = partial(lambda run, q, k, v, listed, *_: run(q, k, v, listed), run)
        try:
            with lowering_for(target_of(devices[0])), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                program = jax.jit(run).lower(x, x, v, listed, segments, scales).compile()
            said = "ok" if "tpu_custom_call" in (program.as_text() or "") else "no kernel in the program"
        except NotImplementedError as reason:
            said = f"declined: {reason}"
        except Exception as error:  # the compiler's, whatever its class
            said = f"{type(error).__name__}: {str(error)[:400]}"
        print(json.dumps({"variant": name, "said": said}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
