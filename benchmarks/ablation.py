"""What each part of CPLI contributes: selections compared at equal widths, over seeds.

    python benchmarks/ablation.py --model=cifar_vgg16_bn --width=0.5 \
        --init_from=vgg16_half_cifar10.npz --data=npz:DIR --macs=0.5,0.3 \
        --seeds=0,1,2 --json=ablation.json

All rows prune the same weights to the same number of channels in each layer (equal
shares), so that only the choice of the channels and the refit differ. A seed draws the
calibration images, the sampled positions and the random scores. Accuracy is of the
whole test split; nothing is chosen by it. Prints mean and sample standard deviation
over the seeds as a table. With --epochs every pruned network is fine-tuned alike.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
from collections.abc import Sequence
from typing import Any

import jax
from cifar_pruning import base_network, make_parser, one_row, percent

from jaxprune.data import batches, load
from jaxprune.summary import commit

UNIFORM = ":allocation=uniform"
ROWS = {
    "random": "random",
    "L1": "l1",
    "Taylor": "taylor",
    "LASSO (He)": "lasso" + UNIFORM,
    "LASSO + loss": "cpli:selection=lasso:feature_importance=False" + UNIFORM,
    "LASSO + importance": "cpli:selection=lasso:mu=0" + UNIFORM,
    "LASSO + both (CPLI)": "cpli:selection=lasso" + UNIFORM,
    "elimination + both": "cpli" + UNIFORM,
}
BARE = ":refit=none"


def table(rows: Sequence[dict[str, Any]], budgets: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, a line for each selection."""
    names = list(dict.fromkeys((row["name"], row["refit"]) for row in rows))
    keys = [k for k in ("pruned", "tuned") if any(k in row for row in rows)]
    heads = [f"{100 * m:g} %, {k}" for m in budgets for k in keys]
    lines = [
        "| selection | refit | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 2) + "|",
    ]
    for name, refit in names:
        cells = []
        for macs in budgets:
            mine = [
                row
                for row in rows
                if (row["name"], row["refit"]) == (name, refit)
                and row["macs_asked"] == macs
            ]
            cells += [spread([row[k] for row in mine if k in row]) for k in keys]
        lines.append(f"| {name} | {refit} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; the value itself if it is alone."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def make_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.set_defaults(methods=",".join(ROWS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--bare", action="store_true", help="every selection without a refit as well"
    )
    return parser.parse_args()


def main() -> None:
    args = make_arguments()
    budgets = [float(macs) for macs in args.macs.split(",")]
    dataset = load(
        args.data,
        data_dir=args.data_dir,
        validation=0.02,
        train_examples=args.train_examples,
        seed=0,
    )
    base = base_network(args, dataset)
    result: dict[str, Any] = {
        "command": vars(args) | {"json": None},
        "commit": commit(),
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()})",
        "base": percent(*base, dataset),
        "rows": [],
    }
    print(json.dumps({"base": result["base"]}), flush=True)
    for seed in map(int, args.seeds.split(",")):
        here = copy.copy(args)
        here.seed = seed
        measured = list(batches(dataset.train.take(args.examples, seed=seed), 250))
        for macs in budgets:
            for name in args.methods.split(","):
                for bare in (False, True)[: 1 + args.bare]:
                    text = ROWS[name] + (BARE if bare else "")
                    row = one_row(here, dataset, base, measured, text, macs)
                    row |= {"name": name, "seed": seed}
                    row["refit"] = "none" if bare else "least squares"
                    result["rows"].append(row)
                    print(json.dumps(row), flush=True)
                    if args.json:  # nothing is lost when it is stopped
                        args.json.write_text(json.dumps(result, indent=1))
    print(f"base {result['base']} %\n{table(result['rows'], budgets)}")


if __name__ == "__main__":
    main()
