"""Budgets that hold, ties, rounding and caps; allocation against brute force."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from jaxprune.errors import BudgetError, ConfigError, PlanError, ScoreError
from jaxprune.records import Group, Slot
from jaxprune.selection import allocate, limits, select, uniform_counts


def make_groups(sizes, kinds=None):
    groups = []
    for i, size in enumerate(sizes):
        leaf = (kinds or ["kernel"] * len(sizes))[i]
        slot = Slot(f"params/conv{i}/{leaf}", 3, np.arange(size)[:, None], "producer")
        groups.append(Group(f"conv{i}", size, (slot,)))
    return groups


class ChainCost:
    """MACs of a chain: neighbouring widths multiply. Counts its calls."""

    def __init__(self, sizes, area=None):
        self.names = [f"conv{i}" for i in range(len(sizes))]
        self.area = area or [1] * (len(sizes) + 1)
        self.calls = 0

    def __call__(self, keep):
        self.calls += 1
        widths = [3, *(len(keep[n]) for n in self.names), 10]
        products = zip(widths, widths[1:], self.area, strict=False)
        return float(sum(a * b * area for a, b, area in products))

    def full(self, groups):
        return self({g.name: np.arange(g.size) for g in groups})


def random_scores(groups, seed=0):
    rng = np.random.default_rng(seed)
    return {g.name: rng.uniform(size=g.size) * 10**i for i, g in enumerate(groups)}


SIZES = [16, 32, 32, 64]


@pytest.mark.parametrize("strategy", ["uniform", "global", "isomorphic"])
@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.21, 0.05])
def test_budget_is_met_and_tight(strategy, ratio):
    groups, cost = make_groups(SIZES), ChainCost(SIZES)
    scores = random_scores(groups)
    limit = ratio * cost.full(groups)
    plan = select(groups, scores, cost, limit, strategy=strategy)
    assert cost(plan) <= limit
    for group in groups:  # no group can take even one more channel
        name, kept = group.name, plan[group.name]
        worst_kept = scores[name][kept].min()
        dropped = np.setdiff1d(np.arange(group.size), kept)
        if dropped.size:
            assert scores[name][dropped].max() <= worst_kept
            assert cost({**plan, name: np.arange(kept.size + 1)}) > limit


def test_uniform_keeps_the_same_share():
    groups, cost = make_groups(SIZES), ChainCost(SIZES)
    counts = uniform_counts(groups, cost, 0.25 * cost.full(groups))
    shares = np.array([counts[g.name] / g.size for g in groups])
    assert np.ptp(shares) < 0.1 and abs(shares.mean() - 0.5) < 0.05


def test_global_follows_the_scores_and_the_normalisation():
    groups, cost = make_groups([8, 8]), ChainCost([8, 8], [0, 0, 0])
    channels = lambda keep: float(sum(len(k) for k in keep.values()))
    scores = {"conv0": np.arange(8.0) + 100, "conv1": np.arange(8.0)}
    plan = select(groups, scores, channels, 9, strategy="global", normalize="none")
    assert plan["conv0"].size == 8 and plan["conv1"].tolist() == [7]
    for how in ("minmax", "standard", "rank"):
        even = select(groups, scores, channels, 8, strategy="global", normalize=how)
        assert even["conv0"].tolist() == even["conv1"].tolist() == [4, 5, 6, 7]
    assert select(groups, scores, cost, 0, strategy="global")["conv0"].size == 8
    with pytest.raises(ConfigError, match="normalize must be 'none', .* found 'x'"):
        select(groups, scores, channels, 8, strategy="global", normalize="x")
    with pytest.raises(ConfigError, match="strategy must be"):
        select(groups, scores, channels, 8, strategy="best")


def test_isomorphic_sets_are_pruned_alike():
    groups = make_groups([10, 10, 10], ["kernel", "kernel", "other"])
    channels = lambda keep: float(sum(len(k) for k in keep.values()))
    scores = {
        "conv0": np.arange(10.0) + 5,
        "conv1": np.arange(10.0),
        "conv2": np.arange(10.0) + 1000,
    }
    plan = select(groups, scores, channels, 15, strategy="isomorphic", normalize="none")
    assert plan["conv2"].size == 5  # as large a share as of the other set
    assert plan["conv0"].size > plan["conv1"].size  # ranked within the set


@pytest.mark.parametrize("strategy", ["uniform", "global", "isomorphic"])
def test_equal_scores_go_by_equal_shares(strategy):
    sizes = (16, 16, 32)
    groups = make_groups(sizes)
    scores = {g.name: np.ones(g.size) for g in groups}
    kept = select(
        groups, scores, lambda kept: sum(map(len, kept.values())), 26, strategy=strategy
    )
    counts = [len(kept[g.name]) for g in groups]
    assert sum(counts) == 26
    np.testing.assert_allclose(np.divide(counts, sizes), 26 / 64, atol=0.07)


def test_ties_never_overshoot():
    groups, cost = make_groups([64, 64]), ChainCost([64, 64])
    scores = {g.name: np.ones(64) for g in groups}
    for strategy in ("uniform", "global"):
        limit = 0.5 * cost.full(groups)
        plan = select(groups, scores, cost, limit, strategy=strategy)
        assert 0.97 * limit <= cost(plan) <= limit
        for kept in plan.values():  # the lower indices stay
            assert kept.tolist() == list(range(kept.size))


@pytest.mark.parametrize("size, round_to", [(16, 8), (12, 8), (3, 8), (1, 4), (64, 16)])
def test_round_to_never_reaches_zero(size, round_to):
    groups = make_groups([size])
    channels = lambda keep: float(len(keep["conv0"]))
    for limit in range(1, size + 1):
        legal = [k for k in range(1, size + 1) if k % round_to == 0 or k == size]
        if limit < legal[0]:
            with pytest.raises(BudgetError, match=f"cost is {legal[0]};"):
                uniform_counts(groups, channels, limit, round_to=round_to)
            continue
        counts = uniform_counts(groups, channels, limit, round_to=round_to)
        assert counts["conv0"] == max(k for k in legal if k <= limit)


def test_overrides_ignore_and_floors():
    groups, cost = make_groups(SIZES), ChainCost(SIZES)
    limit = 0.3 * cost.full(groups)
    plan = select(
        groups, random_scores(groups), cost, limit, strategy="global",
        normalize="none", overrides={"conv1": 0.5}, ignore=["conv0"], min_ratio=0.1,
        min_keep=4,
    )  # fmt: skip
    assert plan["conv0"].size == 16 and plan["conv1"].size == 16
    assert plan["conv2"].size >= 4 and plan["conv3"].size >= 7
    assert cost(plan) <= limit
    capped = limits(groups, min_ratio=0.3, round_to=8)
    assert dict(capped.low) == {"conv0": 8, "conv1": 16, "conv2": 16, "conv3": 24}


def test_errors_name_what_is_wrong():
    groups, cost = make_groups([4, 8]), ChainCost([4, 8])
    scores = {"conv0": np.array([1, np.nan, 1, 1]), "conv1": np.ones(7)}
    with pytest.raises(ScoreError) as caught:
        select(groups, scores, cost, 10)
    assert "'conv0': 1 of 4 scores are NaN" in str(caught.value)
    assert "'conv1': expected (8,), found (7,)" in str(caught.value)
    with pytest.raises(ScoreError, match="'conv1': no scores"):
        select(groups, {"conv0": np.ones(4)}, cost, 10)
    with pytest.raises(BudgetError, match="budget of 10 .* the cost is 14;"):
        uniform_counts(groups, cost, 10)
    with pytest.raises(PlanError, match=r"no group matches \['fc\*'\].*'conv0'"):
        uniform_counts(groups, cost, 100, ignore=["fc*"])
    with pytest.raises(ConfigError, match="overrides"):
        uniform_counts(groups, cost, 100, overrides={"conv0": 0.0})
    with pytest.raises(ConfigError, match="keeps 2 of 4 .*min_keep=3 .* at least 3"):
        uniform_counts(groups, cost, 100, overrides={"conv0": 0.5}, min_keep=3)
    floors = {"conv0": 2, "*": 3}
    counts = uniform_counts(groups, cost, 1e9, overrides={"*0": 0.5}, min_keep=floors)
    assert counts == {"conv0": 2, "conv1": 8}
    assert uniform_counts(groups, cost, 1e9) == {"conv0": 4, "conv1": 8}
    assert len(select([], {}, lambda keep: 0.0, 1.0)) == 0


@pytest.mark.parametrize("strategy", ["uniform", "global", "isomorphic"])
@pytest.mark.parametrize("round_to", [1, 4])
def test_linked_groups_keep_alike_shares(strategy, round_to):
    sizes = [48, 20, 16, 24]
    groups = [
        replace(g, linked="a" if g.size != 20 else "") for g in make_groups(sizes)
    ]
    cost = ChainCost(sizes)
    full = {g.name: g.size for g in groups}
    for ratio in (0.9, 0.5, 0.3):
        limit = ratio * cost.full(groups)
        options = {"strategy": strategy, "round_to": round_to}
        plan = select(groups, random_scores(groups), cost, limit, **options)
        kept = {name: indices.size for name, indices in plan.items()}
        assert cost(plan) <= limit
        n = kept["conv0"] // 6
        assert [kept[k] for k in ("conv0", "conv2", "conv3")] == [6 * n, 2 * n, 3 * n]
        assert all(k % round_to == 0 or k == full[name] for name, k in kept.items())
        # Neither all that are linked nor the other can take a step more.
        step = 4 if round_to == 4 else 1
        parts = {"conv0": 6, "conv2": 2, "conv3": 3}
        more = {name: np.arange(part * (n + step)) for name, part in parts.items()}
        assert cost({**plan, **more}) > limit or n == 8
        more = {"conv1": np.arange(kept["conv1"] + round_to)}
        assert cost({**plan, **more}) > limit or kept["conv1"] == 20


def test_limits_of_linked_groups_meet():
    groups = [replace(g, linked="a") for g in make_groups([24, 8, 12])]
    bounds = limits(groups, min_keep={"conv1": 5, "*": 1})
    assert bounds.low == {"conv0": 18, "conv1": 6, "conv2": 9}
    bounds = limits(groups, overrides={"conv0": 0.5})
    assert bounds.low == bounds.high == {"conv0": 12, "conv1": 4, "conv2": 6}
    bounds = limits(groups, ignore=["conv2"])
    assert bounds.low == {"conv0": 24, "conv1": 8, "conv2": 12}
    curves = {g.name: np.linspace(1, 0, g.size + 1) ** 2 for g in groups}
    cost = ChainCost([24, 8, 12])
    counts = allocate(groups, curves, cost, 0.5 * cost.full(groups))
    assert counts["conv0"] == 3 * counts["conv1"] == 2 * counts["conv2"] < 24


def test_calls_stay_in_the_hundreds():
    sizes = [4096, 2048] * 50
    groups, cost = make_groups(sizes), ChainCost(sizes)
    limit = 0.4 * cost.full(groups)
    cost.calls = 0
    plan = select(groups, random_scores(groups), cost, limit, normalize="mean")
    assert cost.calls < 500 and 0.99 * limit <= cost(plan) <= limit


def brute_force(curves, cost, limit, sizes):
    best = np.inf
    for counts in itertools.product(*(range(1, s + 1) for s in sizes)):
        keep = {f"conv{i}": np.arange(k) for i, k in enumerate(counts)}
        if cost(keep) <= limit:
            loss = sum(curves[f"conv{i}"][k] for i, k in enumerate(counts))
            best = min(best, loss)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_allocation_is_near_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    sizes = [8, 10, 12]
    groups, cost = make_groups(sizes), ChainCost(sizes, list(rng.integers(1, 9, 4)))
    curves = {
        f"conv{i}": rng.uniform(0.2, 9)
        * np.linspace(1, 0, s + 1) ** rng.uniform(1.5, 4)
        for i, s in enumerate(sizes)
    }
    limit = 0.4 * cost.full(groups)
    best = brute_force(curves, cost, limit, sizes)
    counts = allocate(groups, curves, cost, limit)
    keep = {n: np.arange(k) for n, k in counts.items()}
    loss = sum(curves[n][k] for n, k in counts.items())
    assert cost(keep) <= limit
    assert loss <= 1.1 * best + 1e-9
    even = uniform_counts(groups, cost, limit)
    assert loss <= sum(curves[n][k] for n, k in even.items())


def test_allocation_protects_the_sensitive_group():
    groups, cost = make_groups([32, 32]), ChainCost([32, 32])
    flat, steep = np.linspace(0.01, 0, 33), np.linspace(5, 0, 33)
    sampled = (np.array([32, 1, 16]), np.array([0, 0.01, 0.005]))
    limit = 0.5 * cost.full(groups)
    counts = allocate(groups, {"conv0": flat, "conv1": steep}, cost, limit)
    assert counts["conv1"] == 32 and counts["conv0"] < 20
    again = allocate(groups, {"conv0": sampled, "conv1": steep}, cost, limit)
    assert again == counts
    rounded = allocate(
        groups, {"conv0": flat, "conv1": steep}, cost, limit, round_to=8, min_keep=8
    )
    assert all(k % 8 == 0 for k in rounded.values())
    with pytest.raises(ScoreError, match="'conv1' has no loss curve"):
        allocate(groups, {"conv0": flat}, cost, limit)
    with pytest.raises(
        ScoreError, match=r"'conv0': expected a loss at each of 0\.\.32"
    ):
        allocate(groups, {"conv0": flat[1:], "conv1": steep}, cost, limit)
