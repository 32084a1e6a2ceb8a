"""Seconds and memory of tracing and shrinking large networks, without their weights.

    taskset -c 0 python benchmarks/graph_speed.py
    python benchmarks/graph_speed.py --models=resnet50,vit_b16,densenet121 --torch

Each network is measured in a process of its own, at 224 px, with abstract variables,
on a plan that keeps every second channel of every group, once to warm up and then three
times. CPU seconds (user and system) are medians of one core; "program" is what Flax and
JAX take to make the jaxpr, most of `trace`, which `shrink` needs a second time for its
static check. "memory" is what the peak of the process grows by in the first round,
"weights" the bytes the variables would take.

`--torch` measures Torch-Pruning's build and step on the same networks, written in
PyTorch; it needs `pip install torch==2.13.0 torch-pruning==1.6.1`, in an environment
of its own (`--torch-python`).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune import models
from jaxprune.models.resnet import resnet_imagenet
from jaxprune.models.vit import vit

PIXELS = 224
ROUNDS = 3


class DenseNet(nn.Module):
    """DenseNet-121: Huang et al., CVPR 2017, arXiv:1608.06993."""

    blocks: tuple[int, ...] = (6, 12, 24, 16)
    growth: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def normed(x: jax.Array, name: str) -> jax.Array:
            return nn.relu(nn.BatchNorm(True, name=name)(x))

        x = nn.Conv(64, (7, 7), strides=2, use_bias=False, name="stem")(x)
        x = nn.max_pool(normed(x, "stem_bn"), (3, 3), (2, 2), "SAME")
        for b, count in enumerate(self.blocks):
            parts = [x]  # every layer joins all before it, as published code does
            for k in range(count):
                name = f"block{b}_{k}_"
                y = normed(jnp.concatenate(parts, -1), f"{name}bn1")
                y = nn.Conv(4 * self.growth, (1, 1), use_bias=False, name=f"{name}1")(y)
                y = normed(y, f"{name}bn2")
                y = nn.Conv(self.growth, (3, 3), use_bias=False, name=f"{name}2")(y)
                parts.append(y)
            x = jnp.concatenate(parts, -1)
            if b + 1 < len(self.blocks):
                y = normed(x, f"down{b}_bn")
                half = x.shape[-1] // 2
                y = nn.Conv(half, (1, 1), use_bias=False, name=f"down{b}")(y)
                x = nn.avg_pool(y, (2, 2), (2, 2))
        return nn.Dense(1000, name="linear")(normed(x, "bn").mean((1, 2)))


def create(name: str) -> nn.Module:
    """The network of that name."""
    if name == "resnet152":
        return resnet_imagenet(stage_blocks=(3, 8, 36, 3), bottleneck=True)
    if name == "vit_l16":
        return vit(embed_width=1024, depth=24, heads=16)
    return DenseNet() if name == "densenet121" else models.create(name)


def measure(name: str) -> dict[str, Any]:
    """CPU seconds and megabytes of trace and shrink, JSON-ready."""
    model = create(name)
    x = jax.ShapeDtypeStruct((1, PIXELS, PIXELS, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def program() -> Any:  # of a new function each time: JAX keeps those of old ones
        return jax.make_jaxpr(lambda v, i: model.apply(v, i))(variables, x)

    program()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds: dict[str, list[float]] = {"program": [], "trace": [], "shrink": []}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.process_time()
        found = call()
        seconds[name].append(time.process_time() - start)
        return found

    grown = 0
    for k in range(ROUNDS):
        timed("program", program)
        graph = timed("trace", lambda: jp.trace(model, variables, x))
        plan = {group.name: np.arange(0, group.size, 2) for group in graph.groups}
        slim = timed("shrink", lambda g=graph, p=plan: jp.shrink(g, p))
        if k == 0:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    return {
        "groups": len(graph.groups),
        **{name: statistics.median(values) for name, values in seconds.items()},
        "memory_mb": grown / 1024,
        "weights_mb": graph.cost("bytes") / 2**20,
        "left_whole": len(slim.report["left_whole"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="resnet152,vit_l16")
    parser.add_argument("--one", help="measure this model here and print JSON")
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--torch-python", default=sys.executable)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    titles = ("groups", "program", "trace", "shrink", "memory_mb", "weights_mb")
    print(f"{'model':<12}" + "".join(f"{title:>12}" for title in titles))
    for name in arguments.models.split(","):
        command = [sys.executable, __file__, "--one", name]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(found.stdout.splitlines()[-1])
        print(f"{name:<12}" + "".join(f"{row[title]:>12.2f}" for title in titles))
        if arguments.torch:
            script = __file__.replace("graph_speed", "torch_pruning_speed")
            subprocess.run([arguments.torch_python, script, name], check=True)


if __name__ == "__main__":
    main()
