"""Accuracy of every method on one trained network, straight after pruning and tuned.

    python benchmarks/cifar_pruning.py --model=cifar_vgg16_bn --width=0.5 \
        --init_from=vgg16_half_cifar10.npz --data=npz:DIR --macs=0.5,0.3 \
        --methods=l1,taylor,lasso,cpli --epochs=1 --json=out.json

All methods prune the same weights with the same calibration images to the same MACs,
in one process. Options of a method follow its name: cpli:mu=0:allocation=uniform.
importance_redundancy:preset=seed knows no budget: its entropy threshold is bisected,
on the calibration images, until the MACs fit. Accuracy is of the whole test split;
nothing is chosen by it. On 2 CPU cores a half-width VGG-16 takes about 2 minutes a
method and 4 an epoch.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxprune as jp
from jaxprune import checkpoint, models
from jaxprune.data import batches, load
from jaxprune.summary import commit
from jaxprune.train import evaluate, fit


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of "cpli:mu=0:allocation=uniform"."""
    name, *parts = text.split(":")
    options = {}
    for part in parts:
        key, _, value = part.partition("=")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return name, options


def base_network(args: argparse.Namespace, dataset: Any) -> tuple[Any, Any]:
    """The unpruned model and its trained variables."""
    model = models.create(args.model, num_classes=dataset.num_classes, width=args.width)
    x = jnp.zeros((1, *dataset.image_shape))
    template = jax.eval_shape(model.init, jax.random.key(0), x)
    return model, checkpoint.init_from(args.init_from, template)


# Entropies of the script lie below this: 11 classes, and its smoothing adds a little.
HIGHEST_ENTROPY = 2.5


def prune_to(
    base: tuple[Any, Any],
    measured: list[Any],
    name: str,
    macs: float,
    seed: int,
    options: dict[str, Any],
) -> jp.Slim:
    """The network pruned by a method to `macs`, or a little less for the preset."""
    if options.get("preset") != "seed":
        return jp.prune(*base, measured, method=name, macs=macs, seed=seed, **options)
    low, high, best = 0.0, HIGHEST_ENTROPY, None
    while best is None or high - low > 0.02:
        threshold = (low + high) / 2
        slim = jp.prune(
            *base, measured, method=name, seed=seed, entropy_threshold=threshold,
            **options,
        )  # fmt: skip
        found = slim.report["achieved"]["macs"]
        print(json.dumps({"entropy_threshold": threshold, "macs": found}), flush=True)
        low, high = (low, threshold) if found <= macs else (threshold, high)
        if found <= macs:
            best = slim
        if macs - 0.02 <= found <= macs:
            break
    return best


def one_row(
    args: argparse.Namespace,
    dataset: Any,
    base: tuple[Any, Any],
    measured: list[Any],
    text: str,
    macs: float,
) -> dict[str, Any]:
    """Prunes by one method to one budget; accuracies in percent."""
    name, options = parse_method(text)
    start = time.perf_counter()
    slim = prune_to(base, measured, name, macs, args.seed, options)
    seconds = time.perf_counter() - start
    row = {
        "method": text,
        "macs_asked": macs,
        "asked": slim.report["asked"],
        "macs": slim.report["achieved"]["macs"],
        "params": slim.report["achieved"]["params"],
        "pruned": percent(slim.model, slim.variables, dataset),
        "seconds": round(seconds, 1),
        "verify_max_abs_error": slim.report["verify_max_abs_error"],
        "widths": [g["kept"] for g in slim.report["groups"]],
    }
    return row | tuned(args, base, (slim.model, slim.variables), dataset)


def tuned(
    args: argparse.Namespace,
    base: tuple[Any, Any],
    pruned: tuple[Any, Any],
    dataset: Any,
) -> dict[str, Any]:
    """Accuracy after `args.epochs` of fine-tuning, in percent; nothing for none."""
    if not args.epochs:
        return {}
    start = time.perf_counter()
    found = fit(
        *pruned,
        dataset,
        epochs=args.epochs,
        batch_size=128,
        learning_rate=args.learning_rate,
        weight_decay=5e-4,
        warmup_epochs=0.1,
        teacher=base if args.distill_weight else None,
        distill_weight=args.distill_weight,
        seed=args.seed,
    )
    return {
        "tuned": percent(pruned[0], found, dataset),
        "tuning_seconds": round(time.perf_counter() - start, 1),
    }


def percent(model: Any, variables: Any, dataset: Any) -> float:
    return round(100 * evaluate(model, variables, dataset.test)["accuracy"], 2)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that comparisons on one trained network share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--init_from", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--data_dir")
    parser.add_argument("--macs", default="0.5")
    parser.add_argument("--methods", default="l1,taylor,lasso,cpli")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--learning_rate", type=float, default=0.01)
    parser.add_argument("--distill_weight", type=float, default=0.0)
    parser.add_argument(
        "--train_examples", type=int, help="all that calibration and tuning see"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser


def main() -> None:
    args = make_parser(__doc__).parse_args()
    dataset = load(
        args.data,
        data_dir=args.data_dir,
        validation=0.02,
        train_examples=args.train_examples,
        seed=args.seed,
    )
    base = base_network(args, dataset)
    examples = dataset.train.take(args.examples, seed=args.seed)
    measured = list(batches(examples, 250))
    result: dict[str, Any] = {
        "command": vars(args) | {"json": None},
        "commit": commit(),
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()})",
        "seed": args.seed,
        "base": percent(*base, dataset),
        "rows": [],
    }
    print(json.dumps({"base": result["base"]}), flush=True)
    for macs in map(float, args.macs.split(",")):
        for text in args.methods.split(","):
            row = one_row(args, dataset, base, measured, text, macs)
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            if args.json:  # written as it comes: nothing is lost when it is stopped
                args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
