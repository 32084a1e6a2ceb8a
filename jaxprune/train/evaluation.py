"""Accuracy and loss of a classifier, and BatchNorm statistics measured afresh."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import trees
from jaxprune.data.batching import prepare, raw_batches
from jaxprune.data.dataset import Split, Transform
from jaxprune.train import sharding
from jaxprune.train.apply import predict, predict_training

Progress = Callable[[str, int, int], None]


def make_evaluator(model: Any, transform: Transform) -> Callable[..., dict]:
    """A function (variables, split, batch_size, on_progress) -> metrics.

    It is compiled once for all its calls with the same batch size.
    """

    @jax.jit
    def totals(variables, x, y, weight):
        logits = predict(model, variables, prepare(x, transform=transform))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        correct = (jnp.argmax(logits, -1) == y) * weight
        return jnp.stack([correct.sum(), (loss * weight).sum()])

    def evaluator(variables, split, batch_size, on_progress=None):
        size = sharding.round_up(batch_size)
        index, hosts = sharding.host()
        # The last batch is filled up with rows of weight zero: one shape to compile.
        fill = -len(split) % size
        rows = np.concatenate([split.rows, np.repeat(split.rows[:1], fill)])
        weights = np.repeat([1, 0], [len(split), fill]).astype(np.float32)
        weights = weights.reshape(-1, hosts, size // hosts)[:, index]
        padded = Split(split.images, split.labels, rows, split.transform)
        total = np.zeros(2)
        batches = raw_batches(padded, size, shard=(index, hosts))
        for i, (x, y) in enumerate(batches):
            total += np.asarray(totals(variables, *sharding.place(x, y, weights[i])))
            if on_progress is not None:
                on_progress("evaluate", i + 1, len(weights))
        accuracy, loss = total / len(split)
        return {"accuracy": float(accuracy), "loss": float(loss)}

    return evaluator


def evaluate(
    model: Any,
    variables: Any,
    split: Split,
    batch_size: int = 500,
    *,
    on_progress: Progress | None = None,
) -> dict[str, float]:
    """{"accuracy": fraction correct, "loss": mean cross-entropy in nats}.

    Raises:
      DataError: the split is empty.
    """
    size = min(batch_size, max(len(split), 1))
    evaluator = make_evaluator(model, split.transform)
    return evaluator(sharding.replicate(variables), split, size, on_progress)


def _momenta(model: Any, variables: Any, x: jax.Array, key: jax.Array) -> dict:
    """1 - momentum of every BatchNorm statistic, by name.

    One update is new = m * old + (1 - m) * batch, and the batch part does not depend
    on the old value: updating 0 and 1 gives m as the difference.
    """
    stats = variables["batch_stats"]
    results = []
    for value in (0.0, 1.0):
        old = jax.tree.map(lambda a, v=value: jnp.full_like(a, v), stats)
        _, new = predict_training(model, {**variables, "batch_stats": old}, x, key)
        results.append(trees.flatten(new["batch_stats"]))
    return {n: 1.0 - np.mean(results[1][n] - results[0][n]) for n in results[0]}


def recalibrate_batch_norm(
    model: Any, variables: Any, batches: Iterable[tuple[Any, Any]]
) -> Any:
    """`variables` with the BatchNorm mean and variance measured over `batches`.

    Whatever the layers' momentum, the result is the statistic of all batches taken
    together: mean = E[mean_b], var = E[var_b + mean_b^2] - mean^2, batches weighted by
    their size. A model without BatchNorm is returned as it is.
    """
    if "batch_stats" not in variables:
        return variables
    key = jax.random.key(0)
    zero = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    start = {**variables, "batch_stats": zero}

    @jax.jit
    def update(x):
        return predict_training(model, start, x, key)[1]["batch_stats"]

    rates: dict[str, float] = {}
    moments: dict[str, np.ndarray] = {}
    count = 0
    for x, _ in batches:
        rates = rates or _momenta(model, variables, x, key)
        batch = {
            name: np.asarray(value, np.float64) / max(rates[name], 1e-6)
            for name, value in trees.flatten(update(x)).items()
        }
        for name, value in batch.items():
            if name.endswith("var"):
                value = value + batch[name[:-3] + "mean"] ** 2
            moments[name] = moments.get(name, 0.0) + len(x) * value
        count += len(x)
    pooled = {name: total / count for name, total in moments.items()}
    final = {
        name: value - pooled[name[:-3] + "mean"] ** 2 if name.endswith("var") else value
        for name, value in pooled.items()
    }
    old = trees.flatten(variables["batch_stats"])
    cast = {name: jnp.asarray(value, old[name].dtype) for name, value in final.items()}
    stats = trees.replace(variables["batch_stats"], cast)
    return {**variables, "batch_stats": stats}
