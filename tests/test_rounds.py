"""Schedules: budgets of the steps, plans of the original, fine-tuning in between."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from zoo import make, random_batches

import jaxprune as jp
from jaxprune.errors import BudgetError, ConfigError
from jaxprune.schedule import limits_at, removed_shares


def test_shares_follow_the_equation():
    assert removed_shares("one-shot", None) == removed_shares("one-shot", 1) == [1.0]
    np.testing.assert_allclose(removed_shares("linear", 4), [0.25, 0.5, 0.75, 1.0])
    # Zhu and Gupta: s_t = s_f + (s_i - s_f) (1 - t / (n dt))^3 with s_i = 0.
    final, steps = 0.8, 5
    expected = [final + (0 - final) * (1 - t / steps) ** 3 for t in range(1, steps + 1)]
    found = np.array(removed_shares("cubic", steps)) * final
    np.testing.assert_allclose(found, expected)
    assert limits_at(100.0, 20.0, [0.5, 1]) == [60.0, 20.0]
    assert limits_at(0.3, 0.1, removed_shares("cubic", 3))[-1] == 0.1


@pytest.mark.parametrize(
    ("schedule", "steps", "error"),
    [
        ("cosine", 3, "must be 'one-shot', 'linear' or 'cubic'; found 'cosine'"),
        ("one-shot", 3, "is one step; found steps=3"),
        ("linear", None, "needs a number of steps"),
        ("cubic", 0, "needs a number of steps, 1 or more"),
    ],
)
def test_wrong_schedules_are_named(schedule, steps, error):
    with pytest.raises(ConfigError, match=error):
        removed_shares(schedule, steps)


def test_steps_compose_to_a_plan_of_the_original():
    """Without refit and tuning the slim weights are the original's, sliced."""
    model, variables, x = make("mlp")
    batches = random_batches(x.shape[1:])
    slim = jp.prune(
        model, variables, batches, method="l2", macs=0.4, refit="none",
        schedule="linear", steps=3,
    )  # fmt: skip
    steps = slim.report["steps"]
    np.testing.assert_allclose([s["asked"]["macs"] for s in steps], [0.8, 0.6, 0.4])
    for step in steps:
        assert 0.8 * step["asked"]["macs"] < step["achieved"]["macs"]
        assert step["achieved"]["macs"] <= step["asked"]["macs"] + 1e-9
    assert steps[-1]["achieved"] == slim.report["achieved"]
    graph = jp.trace(model, variables, x)
    assert slim.plan.sizes == {g.name: g.size for g in graph.groups}
    assert graph.macs(slim.plan) <= 0.4 * graph.macs()
    same = jp.shrink(graph, slim.plan)
    np.testing.assert_array_equal(
        slim.model.apply(slim.variables, x), same.model.apply(same.variables, x)
    )
    assert slim.report["verify_max_abs_error"] < 1e-4


def test_one_step_is_what_no_schedule_gives():
    model, variables, x = make("mlp")
    batches = random_batches(x.shape[1:])
    common = {"method": "l1", "macs": 0.5, "refit": "none"}
    once = jp.prune(model, variables, batches, **common)
    for schedule, steps in (("one-shot", None), ("linear", 1)):
        slim = jp.prune(
            model, variables, batches, schedule=schedule, steps=steps, **common
        )
        assert slim.plan.to_json() == once.plan.to_json()
        assert "steps" not in slim.report


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cpli", {"allocation": "uniform"}),
        pytest.param("lasso", {}, marks=pytest.mark.slow),
        pytest.param("importance_redundancy", {}, marks=pytest.mark.slow),
        ("taylor", {"strategy": "global"}),
    ],
)
def test_every_method_goes_in_steps_with_fine_tuning_between(method, options):
    model, variables, x = make("mlp")
    batches = random_batches(x.shape[1:])
    sizes, tuned = [], []

    def finetune(smaller, current):
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(current)))
        moved = jax.tree.map(lambda a: a * 1.01, current)
        tuned.append(smaller.apply(moved, x))
        return moved

    slim = jp.prune(
        model, variables, batches, method=method, keep=0.4, schedule="cubic",
        steps=3, finetune=finetune, **options,
    )  # fmt: skip
    assert len(sizes) == 2 and sizes[0] > sizes[1]  # between the steps
    asked = [s["asked"]["keep"] for s in slim.report["steps"]]
    np.testing.assert_allclose(asked, 1 - 0.6 * (1 - np.array([8, 1, 0]) / 27))
    for step in slim.report["steps"]:
        assert step["achieved"]["keep"] <= step["asked"]["keep"] + 1e-9
    final = sum(leaf.size for leaf in jax.tree.leaves(slim.variables))
    assert final <= sizes[1]
    assert slim.report["achieved"]["keep"] <= 0.4
    assert slim.model.apply(slim.variables, x).shape == (2, 10)
    assert np.isfinite(tuned[0]).all()


def test_the_tuned_weights_are_pruned_next():
    """What fine-tuning returns is scored and sliced by the next step."""
    model, variables, x = make("mlp")

    def finetune(smaller, current):
        del smaller
        return jax.tree.map(lambda a: jnp.full_like(a, 0.25), current)

    slim = jp.prune(
        model, variables, random_batches(x.shape[1:]), method="l1", keep=0.5, refit="none",
        schedule="linear", steps=2, finetune=finetune,
    )  # fmt: skip
    assert {float(v) for a in jax.tree.leaves(slim.variables) for v in a.ravel()} == {
        0.25
    }


def test_floors_and_overrides_stay_those_of_the_original():
    model, variables, x = make("vgg_small")
    batches = random_batches(x.shape[1:])
    slim = jp.prune(
        model, variables, batches, method="l1", macs=0.3, refit="none",
        schedule="linear", steps=2, overrides={"conv0": 0.5}, min_ratio=0.25,
        round_to=4, strategy="global", normalize="none",
    )  # fmt: skip
    sizes = slim.plan.sizes
    assert len(slim.plan["conv0"]) == 4 == sizes["conv0"] // 2
    for name, kept in slim.plan.items():
        assert len(kept) >= 0.25 * sizes[name] and len(kept) % 4 == 0


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 12, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(12, rngs=rngs)
        self.hidden = nnx.Linear(12, 10, rngs=rngs)
        self.head = nnx.Linear(10, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn(self.conv(x))).mean((1, 2))
        return self.head(nnx.relu(self.hidden(x)))


def test_nnx_objects_go_in_steps():
    model = Net(nnx.Rngs(0))
    batches = random_batches((8, 8, 3), classes=4)
    seen = []

    def finetune(smaller, current):
        seen.append(smaller.hidden.kernel.shape)
        return current

    slim = jp.prune(
        model, batches, method="lasso", macs=0.4, allocation="uniform",
        schedule="linear", steps=2, finetune=finetune,
    )  # fmt: skip
    assert len(seen) == 1 and seen[0] > slim.model.hidden.kernel.shape
    assert slim.model.hidden.kernel.shape == (
        len(slim.plan["conv"]),
        len(slim.plan["hidden"]),
    )
    assert slim.plan.sizes == {"conv": 12, "hidden": 10}
    assert slim.model(jnp.zeros((2, 8, 8, 3))).shape == (2, 4)
    assert model.hidden.kernel.shape == (12, 10)


class Normed(nn.Module):
    """GroupNorm's groups are a setting that shapes do not tell."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(16, (3, 3), name="a")(x)
        x = nn.relu(nn.GroupNorm(num_groups=4, name="norm")(x))
        x = nn.relu(nn.Conv(12, (3, 3), name="b")(x))
        return nn.Dense(4, name="c")(x.mean((1, 2)))


@pytest.mark.slow
def test_other_peoples_modules_are_saved_and_loaded_after_steps(tmp_path):
    model = Normed()
    batches = random_batches((8, 8, 3), classes=4)
    variables = model.init(jax.random.key(0), batches[0][0][:1])
    slim = jp.prune(
        model, variables, batches, method="l1", macs=0.4, schedule="cubic", steps=2
    )
    assert slim.report["achieved"]["macs"] <= 0.4
    jp.save(tmp_path / "slim", slim)
    again = jp.load(tmp_path / "slim", model)
    x = batches[0][0]
    np.testing.assert_array_equal(
        again.model.apply(again.variables, x), slim.model.apply(slim.variables, x)
    )


def test_wrong_calls_are_named_before_anything_runs():
    model, variables, _ = make("mlp")
    batches = random_batches((10,))

    def never(*_):
        raise AssertionError("fine-tuned")

    with pytest.raises(BudgetError, match="macs=0.001 cannot be met: the least is"):
        jp.prune(
            model, variables, batches, method="l1", macs=0.001, schedule="linear",
            steps=4, finetune=never,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="steps=3 needs schedule="):
        jp.prune(model, variables, batches, macs=0.5, steps=3)
    with pytest.raises(ConfigError, match="nothing between steps for finetune="):
        jp.prune(
            model, variables, batches, macs=0.5, schedule="one-shot", finetune=never
        )
    with pytest.raises(ConfigError, match="needs a budget to approach"):
        jp.prune(
            model, variables, batches, method="importance_redundancy",
            schedule="linear", steps=2,
        )  # fmt: skip
