"""Training speed of a CIFAR VGG-16-BN with and without the tiny-map convolution.

    python benchmarks/tiny_map_conv.py [--batch 32] [--steps 3] [--json out.json]
    python benchmarks/tiny_map_conv.py --maps       # each map size alone

Both programs do forward, backward and SGD in float32 on the same synthetic images,
their steps take turns, and the fastest step of each counts. 40 seconds on 2 cores,
most of it for XLA's own convolutions; 10 seconds with --maps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxprune.conv import conv_general_dilated, plain_convolutions
from jaxprune.models import create


def _train_step(model: nn.Module) -> Callable[..., Any]:
    def step(variables, images, labels):
        def loss(params):
            logits, updates = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            log_p = jax.nn.log_softmax(logits)
            return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], 1)), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.01 * g, variables["params"], grads)
        return {"params": params, **updates}

    return jax.jit(step)


def _seconds(run: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start


def measure_training(*, batch: int, steps: int) -> dict[str, Any]:
    """Images per second of each program, their ratio, and seconds to compile."""
    model = create("cifar_vgg16_bn")
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(batch, 32, 32, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(10, size=batch))
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    args = (variables, images, labels)
    start = time.perf_counter()
    with plain_convolutions():
        plain = _train_step(model).lower(*args).compile()
    plain_compile = time.perf_counter() - start
    start = time.perf_counter()
    fast = _train_step(model).lower(*args).compile()
    fast_compile = time.perf_counter() - start

    plain_s, fast_s = [], []
    for _ in track(range(steps + 1), "training steps"):
        plain_s.append(_seconds(plain, *args))
        fast_s.append(_seconds(fast, *args))
    return {
        "network": "VGG-16-BN, 32x32, float32, forward + backward + SGD",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "batch": batch,
        "plain_images_per_s": batch / min(plain_s[1:]),
        "fast_images_per_s": batch / min(fast_s[1:]),
        "ratio": min(plain_s[1:]) / min(fast_s[1:]),
        "plain_compile_s": plain_compile,
        "fast_compile_s": fast_compile,
    }


def measure_maps(*, batch: int, steps: int) -> list[dict[str, Any]]:
    """Milliseconds forward and backward of one 3x3 convolution, per map and stride."""
    cases = [
        (size, channels, stride)
        for stride in (1, 2)
        for size, channels in ((1, 512), (2, 512), (3, 512), (4, 512), (8, 256))
    ]
    return [
        _measure_map(*case, batch=batch, steps=steps)
        for case in track(cases, "convolutions")
    ]


def _measure_map(
    size: int, channels: int, stride: int, *, batch: int, steps: int
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(batch, size, size, channels)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, channels, channels)), jnp.float32)
    row: dict[str, Any] = {"input": size, "channels": channels, "stride": stride}

    def forward(x, k):
        return conv_general_dilated(
            x,
            k,
            (stride, stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def backward(x, k):
        y, pullback = jax.vjp(forward, x, k)
        return pullback(y)

    for way, function in (("forward", forward), ("training", backward)):
        with plain_convolutions():
            plain = jax.jit(function).lower(inputs, kernel).compile()
        fast = jax.jit(function).lower(inputs, kernel).compile()
        for name, program in (("plain", plain), ("fast", fast)):
            times = [_seconds(program, inputs, kernel) for _ in range(steps + 1)]
            row[f"{name}_{way}_ms"] = 1e3 * min(times[1:])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--maps", action="store_true", help="each map size alone")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    measure = measure_maps if args.maps else measure_training
    record = measure(batch=args.batch, steps=args.steps)
    text = json.dumps(record, indent=2)
    if args.json:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
