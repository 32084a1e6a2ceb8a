"""Accuracy and seconds of Torch-Pruning's criteria and jaxprune's, on equal terms.

    pip install 'jaxprune[bench]'
    python benchmarks/vs_torch_pruning.py --model=cifar_vgg16_bn --width=0.5 \
        --init_from=vgg16_half_cifar10.npz --data=npz:DIR --macs=0.7,0.5,0.3 \
        --epochs=1 --json=out.json

The trained Flax weights go to PyTorch and back (logits equal to 1e-4, or it stops).
Both libraries prune them with the same calibration images to the same MACs, counted
on the pruned networks by `jaxprune.trace`. Torch-Pruning takes a share of channels, so
that share is bisected until the MACs meet the budget; "step_seconds" is what its
criterion's data and one build and step at the share found take, "seconds" is with the
search. What Torch-Pruning leaves is converted back to Flax (logits equal to 1e-4, or it
stops), so that accuracy and fine-tuning are one and the same program for all rows.

Every criterion of Torch-Pruning is tried within each group of layers (local) and over
all of them (global); one that fails is a row with its error. Its GroupNormPruner without
sparse training is magnitude_l2 here. On 2 CPU cores a row of Torch-Pruning takes about
20 seconds, one of jaxprune one to six minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import torch_pruning as tp
from cifar_pruning import base_network, make_parser, one_row, percent, tuned
from torch import nn
from torch.nn import functional
from torch_networks import images, largest_difference, to_flax, to_torch
from torch_pruning.pruner import importance

import jaxprune as jp
from jaxprune import trees
from jaxprune.data import batches, load
from jaxprune.data.batching import prepare, raw_batches
from jaxprune.summary import commit
from jaxprune.train import recalibrate_batch_norm

METHODS = "l1,taylor,importance_redundancy,lasso,cpli"
TOLERANCE = 1e-4  # of logits, relative to the largest (at least 1)
SEARCH_STEPS = 9


class Criterion(NamedTuple):
    """One of Torch-Pruning's criteria.

    Attributes:
      make: its Importance.
      measure: (network, importance, calibration) -> None; fills in what it reads.
    """

    make: Callable[[], Any]
    measure: Callable[[nn.Module, Any, list], None] = lambda *_: None


def gradients(network: nn.Module, scorer: Any, data: list) -> None:
    """The gradient of the mean loss over all calibration images."""
    del scorer
    network.zero_grad()
    count = sum(len(y) for _, y in data)
    for x, y in data:
        (functional.cross_entropy(network(x), y, reduction="sum") / count).backward()


def squared_gradients(network: nn.Module, scorer: Any, data: list) -> None:
    """Per-example gradients, as the documentation of GroupHessianImportance says."""
    scorer.zero_grad()
    for x, y in data:
        for i in range(len(y)):
            network.zero_grad()
            functional.cross_entropy(network(x[i : i + 1]), y[i : i + 1]).backward()
            scorer.accumulate_grad(network)


@torch.no_grad()
def activations(network: nn.Module, scorer: Any, data: list) -> None:
    """One forward run of all images: a second one would replace the first's."""
    with scorer.compute_importance(network):
        network(torch.cat([x for x, _ in data]))


def obdc(network: nn.Module, scorer: Any, data: list) -> None:
    """EigenDamage's statistics, in the order that the library's own script has."""
    pruner = tp.pruner.BasePruner(
        network, data[0][0][:1], importance=scorer, ignored_layers=[network.linear]
    )
    scorer._prepare_model(network, pruner)
    for x, y in data:
        network.zero_grad()
        functional.cross_entropy(network(x), y).backward()
        scorer.step()
    scorer._rm_hooks(network)


CRITERIA = {
    "magnitude_l1": Criterion(lambda: importance.MagnitudeImportance(p=1)),
    "magnitude_l2": Criterion(lambda: importance.MagnitudeImportance(p=2)),
    "filter_l1": Criterion(
        lambda: importance.MagnitudeImportance(
            p=1, group_reduction="first", normalizer=None
        )
    ),
    "bn_scale": Criterion(importance.BNScaleImportance),
    "lamp": Criterion(importance.LAMPImportance),
    "fpgm": Criterion(importance.FPGMImportance),
    "random": Criterion(importance.RandomImportance),
    "taylor": Criterion(importance.TaylorImportance, gradients),
    "taylor_multivariable": Criterion(
        lambda: importance.TaylorImportance(multivariable=True), gradients
    ),
    "hessian": Criterion(importance.HessianImportance, squared_gradients),
    "activation": Criterion(importance.ActivationImportance, activations),
    "obdc": Criterion(lambda: importance.OBDCImportance(num_classes=10), obdc),
}


class Peer:
    """Torch-Pruning on one network; what a criterion reads is measured once."""

    def __init__(self, base: tuple[Any, Any], measured: list, seed: int) -> None:
        self.base, self.seed = base, seed
        self.data = [
            (images(x), torch.tensor(np.asarray(y)).long()) for x, y in measured
        ]
        self.network = to_torch(*base)
        self.whole = self.macs(self.network)
        self._measured: dict[str, tuple[nn.Module, Any, float]] = {}

    def macs(self, network: nn.Module) -> int:
        model, variables = to_flax(*self.base, network)
        shape = self.data[0][0].shape
        x = jax.ShapeDtypeStruct((1, *shape[2:], shape[1]), np.float32)
        return jp.trace(model, variables, x).macs()

    def measured(self, name: str) -> tuple[nn.Module, Any, float]:
        """A network with the criterion's data, its Importance, and seconds."""
        if name not in self._measured:
            start = time.perf_counter()
            network, scorer = copy.deepcopy(self.network), CRITERIA[name].make()
            CRITERIA[name].measure(network, scorer, self.data)
            self._measured[name] = network, scorer, time.perf_counter() - start
        return self._measured[name]

    def step(self, name: str, ratio: float, everywhere: bool) -> nn.Module:
        """A copy pruned by that share of channels."""
        source, scorer, _ = self.measured(name)
        network, scorer = copy.deepcopy((source, scorer))
        for new, old in zip(network.parameters(), source.parameters(), strict=True):
            new.grad = None if old.grad is None else old.grad.clone()
        torch.manual_seed(self.seed)
        pruner = tp.pruner.BasePruner(
            network,
            self.data[0][0][:1],
            importance=scorer,
            global_pruning=everywhere,
            pruning_ratio=ratio,
            ignored_layers=[network.linear],
        )
        pruner.step()
        return network.eval()

    def prune(self, name: str, macs: float, everywhere: bool) -> dict[str, Any]:
        """The network within the budget by the least share found, and seconds."""
        measuring = self.measured(name)[2]
        start = time.perf_counter()
        low, high, best = 0.0, 1.0, None
        for _ in range(SEARCH_STEPS):
            ratio = (low + high) / 2
            began = time.perf_counter()
            network = self.step(name, ratio, everywhere)
            seconds = time.perf_counter() - began
            left = self.macs(network) / self.whole
            if left <= macs:
                high, best = ratio, (network, ratio, left, seconds)
            else:
                low = ratio
        if best is None:
            raise RuntimeError(
                f"no share of channels leaves at most {macs} of the MACs"
            )
        network, ratio, left, seconds = best
        return {
            "network": network,
            "ratio": ratio,
            "macs": left,
            "step_seconds": round(measuring + seconds, 1),
            "seconds": round(measuring + time.perf_counter() - start, 1),
        }


@torch.no_grad()
def torch_percent(network: nn.Module, dataset: Any) -> float:
    """Accuracy on the test split, in percent."""
    correct = 0
    for x, y in raw_batches(dataset.test, 500):
        found = network(images(prepare(x, transform=dataset.test.transform)))
        correct += int((found.argmax(1).numpy() == y).sum())
    return round(100 * correct / len(dataset.test), 2)


def check_equal(network: nn.Module, model: Any, variables: Any, x: Any) -> float:
    """The largest difference of the logits; stops where it is above `TOLERANCE`."""
    with torch.no_grad():
        scale = max(1.0, float(network(images(x)).abs().max()))
    difference = largest_difference(network, model, variables, x)
    if not difference <= TOLERANCE * scale:
        raise SystemExit(
            f"the converted network differs by {difference:.3g} in logits that reach "
            f"{scale:.3g}; expected at most {TOLERANCE:g} relative"
        )
    return difference


def peer_row(
    args: argparse.Namespace,
    dataset: Any,
    peer: Peer,
    measured: list,
    name: str,
    macs: float,
    everywhere: bool,
) -> dict[str, Any]:
    """One criterion of Torch-Pruning at one budget; its error where it fails.

    "recalibrated" is with BatchNorm statistics of the calibration images, which
    Torch-Pruning leaves to its user; it is no start of the fine-tuning, whose
    BatchNorm measures its own.
    """
    row = {
        "library": "torch-pruning",
        "method": f"{name}, {'global' if everywhere else 'local'}",
        "macs_asked": macs,
    }
    try:
        found = peer.prune(name, macs, everywhere)
    except Exception as error:  # noqa: BLE001 - any failure of the peer is a result
        return row | {"error": f"{type(error).__name__}: {error}"[:300]}
    network = found.pop("network")
    model, variables = to_flax(*peer.base, network)
    x = np.moveaxis(peer.data[0][0][:64].numpy(), 1, 3)
    shapes = {n: leaf.shape for n, leaf in trees.flatten(variables).items()}
    refreshed = recalibrate_batch_norm(model, variables, measured)
    row |= found | {
        "pruned": percent(model, variables, dataset),
        "recalibrated": percent(model, refreshed, dataset),
        "difference": check_equal(network, model, variables, x),
        "widths": [s[-1] for n, s in shapes.items() if n.endswith("/kernel")],
    }
    return row | tuned(args, peer.base, (model, variables), dataset)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.set_defaults(methods=METHODS)
    parser.add_argument("--criteria", default=",".join(CRITERIA))
    parser.add_argument("--test_examples", type=int, help="default: the whole split")
    # On shared cores PyTorch's threads wait for each other: one was 3 to 8 times as
    # fast as two on a machine with other processes.
    parser.add_argument("--torch_threads", type=int, default=1)
    args = parser.parse_args()
    unknown = set(filter(None, args.criteria.split(","))) - set(CRITERIA)
    if unknown:
        parser.error(
            f"unknown criteria {sorted(unknown)}; known: {', '.join(CRITERIA)}"
        )
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.torch_threads)
    dataset = load(
        args.data,
        data_dir=args.data_dir,
        validation=0.02,
        train_examples=args.train_examples,
        test_examples=args.test_examples,
        seed=args.seed,
    )
    base = base_network(args, dataset)
    calibration = dataset.train.take(args.examples, seed=args.seed)
    measured = list(batches(calibration, 250))
    peer = Peer(base, measured, args.seed)
    result: dict[str, Any] = {
        "command": vars(args) | {"json": None},
        "commit": commit(),
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()})",
        "versions": {"torch": torch.__version__, "torch-pruning": tp.__version__},
        "seed": args.seed,
        "test_examples": len(dataset.test),
        "macs": peer.whole,
        "difference": check_equal(peer.network, *base, measured[0][0]),
        "base": percent(*base, dataset),
        "base_torch": torch_percent(peer.network, dataset),
        "rows": [],
    }
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}), flush=True)

    def record(row: dict[str, Any]) -> None:
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        if args.json:  # written as it comes: nothing is lost when it is stopped
            args.json.write_text(json.dumps(result, indent=1))

    for macs in map(float, args.macs.split(",")):
        for name in filter(None, args.criteria.split(",")):
            for everywhere in (False, True):
                record(peer_row(args, dataset, peer, measured, name, macs, everywhere))
        for text in filter(None, args.methods.split(",")):
            row = one_row(args, dataset, base, measured, text, macs)
            record({"library": "jaxprune", **row})


if __name__ == "__main__":
    main()
