"""Batches split over all devices, everything else on each of them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxprune.errors import ConfigError


def mesh() -> Mesh:
    """All devices of all hosts along one axis, "batch"."""
    return Mesh(np.asarray(jax.devices()), ("batch",))


def replicated() -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh(), PartitionSpec())


def split_batch() -> NamedSharding:
    """The first axis divided over the devices."""
    return NamedSharding(mesh(), PartitionSpec("batch"))


def host() -> tuple[int, int]:
    """(index of this host, number of hosts)."""
    return jax.process_index(), jax.process_count()


def replicate(tree: Any) -> Any:
    """`tree` on every device, as new arrays: the caller's are never donated."""
    sharding = replicated()
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(
            sharding, np.array(jax.device_get(leaf))
        ),
        tree,
    )


def place(*arrays: np.ndarray) -> tuple[jax.Array, ...]:
    """This host's rows of a batch as parts of the arrays that all hosts share."""
    sharding = split_batch()
    return tuple(
        jax.make_array_from_process_local_data(sharding, array) for array in arrays
    )


def round_up(batch_size: int) -> int:
    """The next batch size that the devices divide evenly."""
    count = jax.device_count()
    return -(-batch_size // count) * count


def check_divisible(batch_size: int) -> None:
    """Raises ConfigError unless the devices divide the batch evenly."""
    count = jax.device_count()
    if batch_size % count:
        raise ConfigError(
            f"batch_size={batch_size} does not divide over {count} devices; use a "
            f"multiple of {count}, such as {round_up(batch_size)}"
        )
