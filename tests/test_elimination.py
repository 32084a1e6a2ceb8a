"""Elimination against every candidate refitted, and against what LASSO cannot see."""

import numpy as np
import pytest
from zoo import moments_of

from jaxprune.errors import ScoreError
from jaxprune.solver.elimination import elimination_order
from jaxprune.stats import moments as mom


def plain_elimination(terms, channels, lowest, ridge):
    """Every candidate refitted, the least error taken; two-sided float64."""

    def error(keep):
        total = 0.0
        for moments, kernel, row_channel, s in terms:
            cov = mom.covariances(moments)
            prior, weight = np.asarray(kernel, np.float64), np.square(s)
            k = np.isin(row_channel, [*keep, -1])
            added = ridge * np.diagonal(cov.xx).mean()
            xx, xy, w0 = cov.xx[np.ix_(k, k)], cov.xy[k], prior[k]
            w = np.linalg.solve(xx + added * np.eye(k.sum()), xy + added * w0)
            fit = cov.yy - 2 * (w * xy).sum(0) + (w * (xx @ w)).sum(0)
            fit += added * np.square(w - w0).sum(0)
            total += weight @ fit / (weight @ cov.yy)
        return total

    keep, order = list(range(channels)), []
    while len(keep) > lowest:
        errors = [error([k for k in keep if k != c]) for c in keep]
        order.append(keep.pop(int(np.argmin(errors))))
    return order


@pytest.mark.parametrize("ridge", [1e-6, 0.05])
@pytest.mark.parametrize("consumers", [1, 2])
def test_elimination_takes_what_a_refit_misses_least(ridge, consumers):
    rng = np.random.default_rng(consumers)
    terms = []
    for taps in range(2, 2 + consumers):
        rows = 20 * taps + 3  # three rows are always present
        row_channel = np.append(np.arange(20 * taps) % 20, [-1, -1, -1])
        row_channel[0] = 1  # channel 0 has a row less, channel 1 one more
        x = rng.normal(size=(700, rows)) @ rng.normal(size=(rows, rows))
        kernel = rng.normal(size=(rows, 6)) * rng.uniform(0, 2, size=(rows, 1))
        y = x @ kernel + rng.normal(size=(700, 6))
        terms.append(
            (moments_of(x.astype("f4"), y.astype("f4")), kernel, row_channel,
             rng.uniform(0.1, 2, size=6))
        )  # fmt: skip
    expected = plain_elimination(terms, 20, 1, ridge)
    found = elimination_order(terms, 20, 1, ridge=ridge)
    assert found.tolist() == expected  # 19 steps: past a settling of the inverse
    assert elimination_order(terms, 20, 12, ridge=ridge).tolist() == expected[:8]


def test_elimination_sees_a_scaled_twin_and_the_dead_where_lasso_cannot():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(2000, 6)).astype("f4")
    x = np.concatenate([base, 3 * base[:, :1], np.zeros((2000, 1), "f4")], axis=1)
    kernel = rng.normal(size=(8, 5)) + 1
    y = (x @ kernel).astype("f4")
    term = (moments_of(x, y), kernel, np.arange(8), None)
    gone = elimination_order([term], 8, 6, ridge=0.0)
    assert set(gone.tolist()) in ({0, 7}, {6, 7})
    # The loss term keeps what the classification needs.
    for twin in (0, 6):
        t = np.zeros(8)
        t[twin] = 1000.0
        steered = elimination_order([term], 8, 6, ridge=0.0, loss_scores=t, mu=1.0)
        assert twin not in steered
    with pytest.raises(ScoreError, match=r"a count in 1\.\.8; found 1 consumers and 0"):
        elimination_order([term], 8, 0)
    broken = (moments_of(np.where(x == x[3, 2], np.nan, x), y), kernel, np.arange(8))
    with pytest.raises(ScoreError, match="moments hold NaN or infinity"):
        elimination_order([(*broken, None)], 8, 6)
    with pytest.raises(ScoreError, match="1 values that are NaN or infinite"):
        elimination_order([term], 8, 6, loss_scores=t + [np.inf, *[0] * 7], mu=1.0)


def test_constant_channels_go_first_whatever_the_loss_says():
    """Intercepts make up for them; without one they count as any other."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(500, 10))
    constant = [1, 4, 7]
    x[:, constant] = [0.5, 3.0, -2.0]
    kernel = rng.normal(size=(10, 4))
    term = (
        moments_of(x.astype("f4"), (x @ kernel).astype("f4")),
        kernel,
        np.arange(10),
        None,
    )
    scores = np.where(np.isin(np.arange(10), constant), 5.0, 1.0)
    order = elimination_order([term], 10, 2, loss_scores=scores, mu=1.0)
    assert sorted(order[:3]) == constant
    order = elimination_order(
        [term], 10, 2, loss_scores=scores, mu=1.0, centred=[False]
    )
    assert sorted(order[:3]) != constant
