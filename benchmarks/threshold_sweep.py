"""Both thresholds of importance-then-redundancy against accuracy and MACs.

    python benchmarks/threshold_sweep.py --model=cifar_vgg16_bn --width=0.5 \
        --init_from=vgg16_half_cifar10.npz --data=npz:DIR --out=threshold_sweep

The sweep that the published script leaves to its user: each pair of thresholds prunes
the same trained network, by the script's rules (preset "seed") and by the default,
straight after pruning, without the training between layers. Accuracy is of validation
examples held out of the training split, so that thresholds may be chosen by it.
Writes OUT.json as it goes, and OUT.png at the end. On 2 CPU cores about a minute a run.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import jax
from cifar_pruning import base_network
from matplotlib.figure import Figure

import jaxprune as jp
from jaxprune.data import Dataset, batches, load
from jaxprune.summary import commit
from jaxprune.train import evaluate


def one_run(
    base: tuple[Any, Any],
    measured: list[Any],
    dataset: Dataset,
    preset: str | None,
    entropy: float,
    similarity: float,
) -> dict[str, Any]:
    """What one pair of thresholds leaves; accuracy in percent."""
    start = time.perf_counter()
    slim = jp.prune(
        *base, measured, method="importance_redundancy", preset=preset,
        entropy_threshold=entropy, similarity_threshold=similarity,
    )  # fmt: skip
    return {
        "preset": preset or "default",
        "entropy_threshold": entropy,
        "similarity_threshold": similarity,
        "macs": slim.report["achieved"]["macs"],
        "params": slim.report["achieved"]["params"],
        "accuracy": percent(slim.model, slim.variables, dataset),
        "seconds": round(time.perf_counter() - start, 1),
    }


def percent(model: Any, variables: Any, dataset: Dataset) -> float:
    return round(100 * evaluate(model, variables, dataset.validation)["accuracy"], 2)


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy over the MACs that remain, a line for each similarity threshold."""
    names = ("seed", "default")
    figure = Figure(figsize=(9, 3.8))
    axes = figure.subplots(1, 2, sharey=True, sharex=True)
    for axis, name in zip(axes, names, strict=True):
        rows = [row for row in result["rows"] if row["preset"] == name]
        similarities = sorted({row["similarity_threshold"] for row in rows})
        for place, similarity in enumerate(similarities):
            line = [r for r in rows if r["similarity_threshold"] == similarity]
            line.sort(key=lambda row: row["entropy_threshold"])
            macs = [100 * row["macs"] for row in line]
            accuracy = [row["accuracy"] for row in line]
            (drawn,) = axis.plot(
                macs, accuracy, marker="o", label=f"similarity {similarity}"
            )
            for x, y, row in zip(macs, accuracy, line, strict=True):
                text = f"{row['entropy_threshold']:g}"
                axis.annotate(
                    text, (x, y), (2, 5 - 11 * place), textcoords="offset points",
                    color=drawn.get_color(), fontsize=8,
                )  # fmt: skip
        axis.axhline(result["base"], color="grey", linewidth=0.8)
        axis.set_title(f"{name}; numbers: entropy threshold")
        axis.set_xlabel("MACs left, %")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation accuracy, %")
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--init_from", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--data_dir")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed_entropies", default="0.3,1.2,1.5,1.65")
    parser.add_argument("--entropies", default="0.3,1.4,1.55,1.7,1.8")
    parser.add_argument("--similarities", default="0.8,0.6")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    dataset = load(args.data, data_dir=args.data_dir, validation=0.05, seed=0)
    base = base_network(args, dataset)
    measured = list(batches(dataset.train.take(args.examples, seed=0), 250))
    result: dict[str, Any] = {
        "command": vars(args) | {"out": None},
        "commit": commit(),
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()})",
        "seed": 0,
        "base": percent(*base, dataset),
        "rows": [],
    }
    print(json.dumps({"base": result["base"]}), flush=True)
    sweeps = {"seed": args.seed_entropies, None: args.entropies}
    for preset, entropies in sweeps.items():
        for similarity in map(float, args.similarities.split(",")):
            for entropy in map(float, entropies.split(",")):
                row = one_run(base, measured, dataset, preset, entropy, similarity)
                result["rows"].append(row)
                print(json.dumps(row), flush=True)
                args.out.with_suffix(".json").write_text(json.dumps(result, indent=1))
    draw(result, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
