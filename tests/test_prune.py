"""prune(): budgets, refits, errors and fine-tuning between layers, on small networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import make, random_batches

import jaxprune as jp
from jaxprune.errors import BudgetError, ConfigError, DataError, ScoreError
from jaxprune.methods import cpli
from jaxprune.methods.measure import Calibration, cross_entropy
from jaxprune.methods.sensitivity import divergence


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("vgg_small", "cpli", {}),
        (
            "vgg_small",
            "cpli",
            {"passes": "single", "round_to": 4, "selection": "lasso"},
        ),
        ("vgg_small", "lasso", {"allocation": "uniform"}),
        ("vgg_small", "taylor", {"strategy": "global", "refit": "lstsq"}),
        ("vgg_small", "chip", {"refit": "none"}),
        ("vgg_small", "importance_redundancy", {}),
        ("vit_cifar", "cpli", {"allocation": "uniform"}),
        ("mlp", "entropy", {}),
        ("mlp", "fisher", {}),
    ],
)
def test_every_method_meets_its_budget_and_the_proof(name, method, options):
    model, variables, x = make(name)
    batches = random_batches(x.shape[1:])
    slim = jp.prune(model, variables, batches, method=method, macs=0.5, **options)
    report = slim.report
    assert report["method"] == method
    assert report["asked"]["macs"] == 0.5
    assert 0.4 < report["achieved"]["macs"] <= 0.5
    graph = jp.trace(slim.model, slim.variables, x)
    whole = jp.trace(model, variables, x)
    assert graph.macs() == whole.macs(slim.plan) <= 0.5 * whole.macs()
    assert report["verify_max_abs_error"] < 1e-3
    kept = {g["name"]: g["kept"] for g in report["groups"]}
    assert kept == {n: len(k) for n, k in slim.plan.items()}
    step = options.get("round_to", 1)
    sizes = slim.plan.sizes
    assert all(k % step == 0 or k == sizes[n] for n, k in kept.items())


def test_the_refit_brings_the_outputs_back():
    """Least squares beats a shifted intercept, which beats nothing."""
    model, variables, x = make("vgg_small")
    batches = random_batches(x.shape[1:], count=512, size=128)
    graph = jp.trace(model, variables, batches[0][0])
    loss = divergence(
        graph,
        variables,
        Calibration(random_batches(x.shape[1:], seed=5)),
        cross_entropy,
    )
    left = {}
    for refit in ("none", "bias", "lstsq"):
        slim = jp.prune(
            model,
            variables,
            batches,
            method="l2",
            macs=0.6,
            refit=refit,
            positions=None,
            verify=False,
        )
        run = jax.jit(lambda v, x, m=slim.model: m.apply(v, x))
        held_out = random_batches(x.shape[1:], seed=5)[0][0]
        gap = run(slim.variables, held_out) - model.apply(variables, held_out)
        left[refit] = float(jnp.square(gap).mean())
    assert left["lstsq"] < 0.7 * left["bias"] < 0.7 * left["none"]
    assert loss(variables) < 1e-6


def test_labels_are_needed_for_the_loss_term_only():
    model, variables, _ = make("mlp")
    unlabelled = [(b[0], None) for b in random_batches((10,))]
    slim = jp.prune(model, variables, unlabelled, method="lasso", macs=0.5)
    assert slim.report["achieved"]["macs"] <= 0.5
    with pytest.raises(ScoreError, match="needs labels"):
        jp.prune(model, variables, unlabelled, method="cpli", macs=0.5)
    with pytest.raises(ScoreError, match="'taylor' needs labels"):
        jp.prune(model, variables, unlabelled, method="taylor", macs=0.5)


def test_wrong_calls_say_what_to_do():
    model, variables, _ = make("mlp")
    batches = random_batches((10,))
    with pytest.raises(ConfigError, match="did you mean 'cpli'"):
        jp.prune(model, variables, batches, method="clpi", macs=0.5)
    with pytest.raises(ConfigError, match="no option 'moo'; it takes"):
        jp.prune(model, variables, batches, macs=0.5, moo=1)
    with pytest.raises(ConfigError, match="set selection='lasso' too"):
        jp.prune(model, variables, batches, macs=0.5, nonnegative=False)
    with pytest.raises(BudgetError, match="no budget"):
        jp.prune(model, variables, batches)
    with pytest.raises(BudgetError, match="expected one budget"):
        jp.prune(model, variables, batches, macs=0.5, params=0.5)
    with pytest.raises(BudgetError, match="share that REMAINS"):
        jp.prune(model, variables, batches, macs=50)
    with pytest.raises(DataError, match="batches are empty"):
        jp.prune(model, variables, [], macs=0.5)
    with pytest.raises(ScoreError, match="one loss per example"):
        jp.prune(model, variables, batches, macs=0.5, loss_fn=lambda o, y: jnp.mean(o))
    with pytest.raises(BudgetError):
        jp.prune(model, variables, batches, method="l1", macs=1e-6)


def test_fine_tuning_between_layers_composes_plans():
    model, variables, x = make("mlp")
    calls = []

    def finetune(smaller, tuned):
        calls.append(sum(leaf.size for leaf in jax.tree.leaves(tuned)))
        return jax.tree.map(lambda a: a * 1.0, tuned)

    batches = random_batches(x.shape[1:])
    slim = jp.prune(
        model, variables, batches, method="l1", macs=0.5, refit="none",
        finetune=finetune,
    )  # fmt: skip
    once = jp.prune(model, variables, batches, method="l1", macs=0.5, refit="none")
    assert len(calls) == len(once.report["groups"]) == 2
    assert calls == sorted(calls, reverse=True)
    assert slim.plan.to_json() == once.plan.to_json()
    np.testing.assert_allclose(
        slim.model.apply(slim.variables, x), once.model.apply(once.variables, x), 1e-4
    )


def test_groups_with_a_wide_consumer_take_lasso(monkeypatch):
    """Elimination would invert a matrix of as many rows as the consumer has."""
    model, variables, x = make("mlp")
    batches = random_batches(x.shape[1:])

    def plan(**options):
        slim = jp.prune(
            model, variables, batches, keep=0.5, allocation="uniform", verify=False,
            **options,
        )  # fmt: skip
        return slim.plan.to_json()

    eliminated, lasso = plan(), plan(selection="lasso")
    assert eliminated != lasso
    monkeypatch.setattr(cpli, "WIDEST", 8)
    assert plan() == lasso


def test_activations_that_overflow_are_named():
    model, variables, _ = make("mlp")
    loud = [(1e25 * x, y) for x, y in random_batches((10,))]
    with pytest.raises(
        ScoreError, match=r"features that params/\S+ (reads|makes) over"
    ):
        jp.prune(model, variables, loud, method="lasso", macs=0.5)
