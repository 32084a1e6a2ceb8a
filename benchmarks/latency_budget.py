"""Asked, predicted and measured latency of networks pruned to a latency budget.

    python benchmarks/latency_budget.py --model=cifar_vgg16_bn --width=0.5 --batch=64

Weights and scores are random: they do not matter for the time. "table_seconds" is what
timing the layers takes, once for a device; "seconds" what choosing the plan takes with it,
slim models measured for corrections included. Then the slim model is measured anew, and
the whole one ("base_ms"). For comparison the slim model of the same MACs, at whatever
widths.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune import budget, models
from jaxprune.cost import latency_ms
from jaxprune.latency import measure_latency
from jaxprune.summary import commit


def measure(graph: Any, plan: Any, x: Any) -> float:
    slim = jp.shrink(graph, plan)
    return latency_ms(slim.model, slim.variables, x)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cifar_vgg16_bn")
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--shares", default="0.75,0.5,0.35")
    args = parser.parse_args()
    model = models.create(args.model, width=args.width)
    x = jnp.zeros((args.batch, args.size, args.size, 3))
    graph = jp.trace(model, jax.jit(model.init)(jax.random.key(0), x[:1]), x)
    rng = np.random.default_rng(0)
    scores = {group.name: rng.uniform(size=group.size) for group in graph.groups}
    start = time.perf_counter()
    table = measure_latency(graph)
    result: dict[str, Any] = {
        "commit": commit(),
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()})",
        "table_seconds": round(time.perf_counter() - start, 1),
        "base_ms": table.base_ms,
        "layers_ms": table.base_ms - table.rest_ms,
    }
    print(json.dumps(result), flush=True)
    for share in map(float, args.shares.split(",")):
        asked = budget.one_budget(latency_ms=share * table.base_ms)
        assert asked is not None
        bound = budget.Constraint(
            asked, table.predict, asked.value, table.base_ms, table=table
        )
        start = time.perf_counter()
        plan, used = budget.select_within(graph, scores, bound, graph.groups, {})
        seconds = time.perf_counter() - start
        left = graph.macs(plan) / graph.macs()
        by_macs = jp.select(graph, scores, macs=left)
        row = {
            "asked_ms": asked.value,
            "predicted_ms": budget.predicted_ms(used, plan),
            "corrections": 0 if used.table is None else len(used.table.known),
            "measured_ms": measure(graph, plan, x),
            "base_ms": latency_ms(model, graph.variables, x),
            "seconds": round(seconds, 1),
            "macs": left,
            "measured_ms_by_macs": measure(graph, by_macs, x),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
