"""Every method on networks of other families: attention, depthwise, concatenations, SE.

    python benchmarks/other_networks.py --data=DIR --weights=DIR2 --macs=0.5,0.3

Trains each network for some minutes on 15,000 CIFAR-10 images at 16x16 pixels (kept
under --weights, so that it is done once), prunes it by every method with the same 1,000
calibration images of its training data, and prints the accuracy on the first 3,000 test
images straight after pruning. The U-Net takes noise out of images and is judged by the
share of the variance that it explains, in percent. `DIR` holds train.npz and test.npz.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from cifar_pruning import parse_method
from small_networks import DenseNet, MobileNet, SEResNet, UNet, ViT

import jaxprune as jp
from jaxprune.summary import commit

# Network, epochs, peak learning rate.
NETWORKS = {
    "vit": (ViT(), 10, 1e-3),
    "se_resnet": (SEResNet(), 6, 3e-3),
    "densenet": (DenseNet(), 5, 3e-3),
    "mobilenet": (MobileNet(), 8, 3e-3),
    "unet": (UNet(), 3, 3e-3),
}
BATCH = 64
NOISE = 0.5


def images(file: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images (count, 16, 16, 3) and labels."""
    held = np.load(file)
    x = held["x"][:count].astype(np.float32)
    x = x.reshape(count, 16, 2, 16, 2, 3).mean((2, 4)) / 255
    return ((x - 0.47) / 0.25).astype(np.float32), held["y"][:count].astype(np.int32)


def task(name: str, folder: Path) -> tuple[np.ndarray, ...]:
    """Inputs and targets, of the training images and of the test images."""
    x, y = images(folder / "train.npz", 15_000)
    x_test, y_test = images(folder / "test.npz", 3_000)
    if name != "unet":
        return x, y, x_test, y_test
    rng = np.random.default_rng(1)
    noisy = [
        (a + NOISE * rng.standard_normal(a.shape)).astype(np.float32)
        for a in (x, x_test)
    ]
    return noisy[0], x, noisy[1], x_test


def loss_fn(name: str) -> Callable[[Any, Any], jax.Array]:
    """Per-example losses (B,)."""
    if name == "unet":
        return lambda outputs, y: jnp.square(outputs - y).mean((1, 2, 3))
    return optax.softmax_cross_entropy_with_integer_labels


def train(
    name: str, model: Any, epochs: int, rate: float, x: np.ndarray, y: np.ndarray
) -> Any:
    """The variables after training by AdamW, seed 0."""
    variables = dict(model.init(jax.random.key(0), x[:1]))
    params, loss = variables.pop("params"), loss_fn(name)
    steps = epochs * (len(x) // BATCH)
    schedule = optax.warmup_cosine_decay_schedule(0, rate, steps // 10, steps)
    optimizer = optax.adamw(schedule, weight_decay=1e-2)
    state, rng = optimizer.init(params), np.random.default_rng(0)

    @jax.jit
    def step(params: Any, rest: Any, state: Any, x: Any, y: Any) -> Any:
        def total(params: Any) -> Any:
            outputs, new = model.apply(
                {"params": params, **rest}, x, train=True, mutable=["batch_stats"]
            )
            return loss(outputs, y).mean(), dict(new)

        grads, new = jax.grad(total, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), new, state

    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            few = x[chosen]
            if name != "unet" and rng.random() < 0.5:
                few = few[:, :, ::-1]
            params, variables, state = step(params, variables, state, few, y[chosen])
    return {"params": params, **variables}


def trained(name: str, folder: Path, x: np.ndarray, y: np.ndarray) -> tuple[Any, Any]:
    """The model and its trained variables, from the folder if they are there."""
    model, epochs, rate = NETWORKS[name]
    file = folder / f"{name}.msgpack"
    template = model.init(jax.random.key(0), x[:1])
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        variables = train(name, model, epochs, rate, x, y)
        file.write_bytes(flax.serialization.to_bytes(variables))
    return model, flax.serialization.from_bytes(template, file.read_bytes())


def quality(name: str, model: Any, variables: Any, x: np.ndarray, y: Any) -> float:
    """Accuracy, or variance explained, in percent."""
    run = jax.jit(lambda v, x: model.apply(v, x))
    outputs = np.concatenate(
        [run(variables, x[i : i + 500]) for i in range(0, len(x), 500)]
    )
    if name == "unet":
        return 100 * (1 - float(np.square(outputs - y).mean() / y.var()))
    return 100 * float((outputs.argmax(-1) == y).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument(
        "--methods", default="cpli,lasso,importance_redundancy,l1,random"
    )
    parser.add_argument("--macs", default="0.5,0.3")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shares = [float(share) for share in args.macs.split(",")]
    print(f"commit {commit()}, seed {args.seed}, {jax.devices()[0].device_kind}")
    print(f"| network, base | method | {' | '.join(map(str, shares))} | seconds |")
    print("|---" * (3 + len(shares)) + "|")
    for name in args.networks.split(","):
        x, y, x_test, y_test = task(name, args.data)
        model, variables = trained(name, args.weights, x, y)
        first = f"{name}, {quality(name, model, variables, x_test, y_test):.2f}"
        batches = [
            (x[i : i + 250], y[i : i + 250]) for i in range(0, args.examples, 250)
        ]
        for method in args.methods.split(","):
            kind, options = parse_method(method)
            row, start = [], time.perf_counter()
            for macs in shares:
                slim = jp.prune(
                    model, variables, batches, method=kind, macs=macs, seed=args.seed,
                    loss_fn=loss_fn(name), **options,
                )  # fmt: skip
                found = quality(name, slim.model, slim.variables, x_test, y_test)
                row.append(f"{found:.2f}")
            seconds = time.perf_counter() - start
            print(
                f"| {first} | {method} | {' | '.join(row)} | {seconds:.0f} |",
                flush=True,
            )
            first = ""


if __name__ == "__main__":
    main()
