"""Models of public code bases: traced, half of them removed, proved, fine-tuned a step.

    python benchmarks/off_the_shelf.py --json=found.jsonl
    python benchmarks/off_the_shelf.py --shelves=transformers_models --only='*BERT*'
    python benchmarks/off_the_shelf.py --table=found.jsonl

Every model of `benchmarks/shelves` gets random weights (seed 0) and a small input;
those of packages need `pip install -e '.[zoo]'`. A plan keeps a random half of every
group. `shrink` emits the smaller model; where it leaves groups whole because the source
states a width, `shrink(replay=True)` is tried as well. `verify` compares each with the
masked original, and one gradient step of the mean square of the outputs is taken.

Columns: groups; "prunable", the share of the parameters that can go (one channel of
every group stays); "emitted" and "replayed", the share of what the plan removes that the
smaller model, or the replayed function, really loses (groups and plan of the last of
them, which `trace(replay=True)` makes); the largest error of `verify`, relative to the
largest output of the slim model; CPU seconds of trace and shrink.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import subprocess
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from shelves.case import SEED, Case

import jaxprune as jp
from jaxprune.frameworks import handle_of

SHELVES = (
    "convolutional vision_transformers language agents_and_speech generative "
    "nnx_examples nnx_ports transformers_models keras_models haiku_models "
    "equinox_models linen_packages nnx_packages nnx_image_models"
).split()
# Emission counts as whole where it removes this share of what the plan says.
WHOLE = 0.999


def half(graph: jp.ChannelGraph, seed: int = SEED) -> dict[str, np.ndarray]:
    """A plan that keeps a random half of every group, rounded up."""
    rng = np.random.default_rng(seed)
    return {
        group.name: rng.permutation(group.size)[: -(-group.size // 2)]
        for group in graph.groups
    }


def removed(graph: jp.ChannelGraph, plan: Any) -> int:
    return graph.params() - graph.params(plan)


def gradient_step(call: Callable[..., Any], variables: Any, inputs: Any) -> float:
    """The largest output, after one step of descent on the outputs' mean square.

    Raises:
      FloatingPointError: no gradient, one that is not finite, or a loss that rises.
    """
    leaves, tree = jax.tree.flatten(variables)
    real = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def loss(moving: list[Any]) -> tuple[Any, Any]:
        given = iter(moving)
        full = [next(given) if r else x for x, r in zip(leaves, real, strict=True)]
        out = jax.tree.leaves(call(jax.tree.unflatten(tree, full), *inputs))
        floats = [x for x in out if jnp.issubdtype(x.dtype, jnp.inexact)]
        squares = [jnp.square(jnp.abs(x).astype(jnp.float32)) for x in floats]
        most = jnp.stack([jnp.max(x) for x in squares]).max()
        return sum(jnp.mean(x) for x in squares), jnp.sqrt(most)

    def norm(arrays: list[Any]) -> Any:
        return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in arrays))

    def step(moving: list[Any]) -> Any:
        (before, most), slope = jax.value_and_grad(loss, has_aux=True)(moving)
        size = norm(slope)

        def after(rate: Any) -> Any:
            by = rate * norm(moving) / jnp.maximum(size, 1e-30)
            moved = [x - (by * g).astype(x.dtype) for x, g in zip(moving, slope)]
            return loss(moved)[0]

        # As far as a line search goes: deep networks with random weights are steep.
        rates = jnp.array([1e-3, 1e-4, 1e-5])
        return before, jax.lax.map(after, rates).min(), size, most

    moving = [x for x, r in zip(leaves, real, strict=True) if r]
    before, after, size, most = (float(x) for x in jax.jit(step)(moving))
    if not (np.isfinite([before, after, size]).all() and size > 0 and after < before):
        raise FloatingPointError(
            f"loss {before:.4g} -> {after:.4g}, gradient norm {size:.4g}"
        )
    return most


def measure(case: Case) -> dict[str, Any]:
    """The row of one model; what fails is in "failed"."""
    row: dict[str, Any] = {"failed": None}
    given = (case.variables,) if case.variables is not None else ()
    options: dict[str, Any] = {"apply": case.apply, "outputs": case.outputs}
    stage = "trace"
    try:
        start = time.process_time()
        graph = jp.trace(case.model, *given, case.inputs, **options)
        row["trace_s"] = time.process_time() - start
        row |= {"params": graph.params(), "unknown": dict(graph.unknown)}
        errors = []
        ways = (("emitted", False), ("replayed", True))
        for way, replay in ways[case.replay_only :]:
            stage = f"shrink ({way})"
            if replay:
                options["replay"] = True
                graph = jp.trace(case.model, *given, case.inputs, **options)
            plan = half(graph)
            fewest = {group.name: [0] for group in graph.groups}
            row["groups"] = len(graph.groups)
            row["prunable"] = removed(graph, fewest) / max(graph.params(), 1)
            wanted = removed(graph, plan)
            start = time.process_time()
            slim = jp.shrink(graph, plan)
            row[f"{way}_shrink_s"] = time.process_time() - start
            row[way] = removed(graph, slim.plan) / wanted if wanted else 0.0
            row[f"{way}_left"] = dict(list(slim.report["left_whole"].items())[:6])
            if row[way]:
                stage = f"verify ({way})"
                error = jp.verify(graph, slim.plan, case.inputs)
                stage = f"gradient step ({way})"
                handle = handle_of(slim.model, None if replay else case.apply)
                most = gradient_step(handle, slim.variables, case.inputs)
                errors.append(error / max(1.0, most))
            if row[way] >= WHOLE or not wanted:
                break
        row["error"] = max(errors, default=0.0)
    except Exception as error:  # noqa: BLE001  (every kind of failure is a result)
        row["failed"] = f"{stage}: {type(error).__name__}: {error}"
        row["traceback"] = traceback.format_exc()
    return row


def commit() -> str:
    """The commit that is measured, marked where the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def state(row: dict[str, Any]) -> str:
    """emitted, emitted in part, replayed, replayed in part, whole or failed."""
    if row["failed"]:
        return "failed"
    for way in ("emitted", "replayed"):
        if row.get(way, 0.0) >= WHOLE:
            return way
    best = max(("emitted", "replayed"), key=lambda way: row.get(way, 0.0))
    return f"{best} in part" if row.get(best) else "whole"


def table(path: str) -> str:
    """Markdown of the rows in a file; the last row of every model counts."""
    with open(path) as lines:
        rows = [json.loads(line) for line in lines]
    found = {(row["shelf"], row["name"]): row for row in rows}
    text = [
        "| model | parameters | groups | prunable | emitted | replayed | error | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (_, name), row in found.items():
        if row["failed"]:
            text.append(f"| {name} | failed: {row['failed'].splitlines()[0][:90]} |")
            continue
        seconds = sum(
            row.get(f"{key}_s", 0.0)
            for key in ("trace", "emitted_shrink", "replayed_shrink")
        )
        emitted, replayed = (
            f"{row[way]:.0%}" if way in row else "" for way in ("emitted", "replayed")
        )
        text.append(
            f"| {name} | {row['params']:,} | {row['groups']} | {row['prunable']:.0%} | "
            f"{emitted} | {replayed} | {row['error']:.0e} | {seconds:.1f} |"
        )
    counts: dict[str, int] = {}
    for row in found.values():
        counts[state(row)] = counts.get(state(row), 0) + 1
    summary = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
    return "\n".join([*text, "", f"{len(found)} models: {summary}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shelves", default=",".join(SHELVES))
    parser.add_argument("--only", default="*", help="name pattern")
    parser.add_argument("--json", help="rows are added to this file")
    parser.add_argument("--table", help="print the table of this file, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.table))
        return
    # Programs run once or twice: what XLA takes to optimise them is not regained.
    jax.config.update("jax_disable_most_optimizations", True)
    for shelf in arguments.shelves.split(","):
        for name, make in importlib.import_module(f"shelves.{shelf}").MODELS.items():
            if not fnmatch.fnmatch(name, arguments.only):
                continue
            start = time.perf_counter()
            try:
                row = measure(make())
            except Exception as error:  # noqa: BLE001  (shown: it is not built)
                row = {"failed": f"build: {type(error).__name__}: {error}"}
                row["traceback"] = traceback.format_exc()
            row |= {"shelf": shelf, "name": name, "commit": commit()}
            row["total_s"] = time.perf_counter() - start
            brief = row["failed"] or f"{row['error']:.1e}"
            print(f"{state(row):<18} {row['total_s']:6.1f} s  {name}  {brief}"[:400])
            if arguments.json:
                with open(arguments.json, "a") as file:
                    file.write(json.dumps(row) + "\n")
            jax.clear_caches()


if __name__ == "__main__":
    main()
