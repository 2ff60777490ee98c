"""Device meshes. Placement is data: a mesh and shardings, never code in a model."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh(devices: int | None = None) -> Mesh:
    """A mesh of one axis, "data", over the first `devices` devices (None: all of them).

    Raises:
      ValueError: fewer than one device, or more than there are.
    """
    there = jax.devices()
    n = len(there) if devices is None else devices
    if not 1 <= n <= len(there):
        raise ValueError(f"devices={n}; allowed: 1 ... {len(there)} ({there[0].platform})")
    if n < len(there) and jax.process_count() > 1:
        raise ValueError(f"devices={n}; allowed: {len(there)}, all those of the {jax.process_count()} processes")
    return jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,), devices=there[:n])


def batch_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """Splits the leading axis of a batch over "data"; refuses a batch that does not divide."""
    n = mesh.shape["data"]
    if batch % n:
        raise ValueError(f"batch={batch} must be divisible by the {n} devices of the mesh")
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """One full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
