"""The refit against float64 lstsq, its prior, and channels of very different energy."""

import numpy as np
import pytest
from zoo import gate_data, moments_of

from jaxprune.errors import ScoreError
from jaxprune.solver.elimination import elimination_order
from jaxprune.solver.refit import default_ridge, refit, relative_residual


def lstsq(x, y, keep):
    x, y = x.astype(np.float64), y.astype(np.float64)
    inputs = np.concatenate([x[:, keep], np.ones((len(x), 1))], axis=1)
    w = np.linalg.lstsq(inputs, y, rcond=None)[0]
    error = ((y - inputs @ w) ** 2).mean(0) / y.var(0)
    return w[:-1], w[-1], error


def test_refit_equals_lstsq():
    x, y, kernel, _, _ = gate_data(samples=3000)
    keep = np.arange(x.shape[1]) % 3 > 0
    found = refit(moments_of(x, y), keep, kernel=kernel, ridge=0.0)
    w, b, error = lstsq(x, y, keep)
    np.testing.assert_allclose(found.kernel[keep], w, atol=1e-4)
    assert not found.kernel[~keep].any()
    np.testing.assert_allclose(found.intercept, b, atol=1e-4)
    np.testing.assert_allclose(found.residual, error, rtol=1e-4)
    masked = relative_residual(moments_of(x, y), kernel * keep[:, None])
    assert (masked > found.residual).all()
    no_intercept = refit(moments_of(x, y), keep, ridge=0.0, intercept=False)
    assert not no_intercept.intercept.any()
    x64, y64 = x[:, keep].astype(np.float64), y.astype(np.float64)
    w = np.linalg.lstsq(x64, y64, rcond=None)[0]
    np.testing.assert_allclose(no_intercept.kernel[keep], w, atol=1e-4)


def test_refit_on_ill_conditioned_rows():
    """Condition number 1e10 and a near-constant target: the residual still agrees."""
    rng = np.random.default_rng(0)
    rows, samples = 96, 6000
    basis, _ = np.linalg.qr(rng.normal(size=(rows, rows)))
    spectrum = np.logspace(0, -5, rows)  # of x; its square for the Gram matrix
    x = ((rng.normal(size=(samples, rows)) * spectrum) @ basis + 0.5).astype("f4")
    y = x @ rng.normal(size=(rows, 8)) + 0.3 * rng.normal(size=(samples, 8))
    y = y.astype(np.float32)
    keep = np.arange(rows) % 2 == 0
    found = refit(moments_of(x, y), keep, ridge=0.0)
    inputs = x[:, keep].astype(np.float64)
    error = y - inputs @ found.kernel[keep].astype(np.float64) - found.intercept
    _, _, best = lstsq(x, y, keep)
    measured = (error**2).mean(0) / y.astype(np.float64).var(0)
    assert (measured <= best * (1 + 1e-4)).all()
    np.testing.assert_allclose(found.residual, best, rtol=1e-4)
    crude = x[:, keep].T @ x[:, keep]  # float32 normal equations without centring
    wrong = np.linalg.solve(crude, x[:, keep].T @ y)
    error = y - inputs @ wrong
    assert ((error**2).mean(0) / y.var(0) > best * (1 + 1e-4)).any()


def test_refit_falls_back_on_the_prior():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(6, 2)).astype(np.float32)
    dead = moments_of(np.zeros((10, 6)), rng.normal(size=(10, 2)))
    np.testing.assert_allclose(
        refit(dead, np.ones(6, bool), kernel=kernel).kernel, kernel
    )
    nothing = refit(dead, np.zeros(6, bool), kernel=kernel)
    assert not nothing.kernel.any()
    np.testing.assert_allclose(nothing.residual, 1.0, rtol=1e-5)
    # One sample cannot tell six weights apart; what it does not see stays.
    x = rng.normal(size=(1, 6))
    one = refit(moments_of(x, x @ kernel), np.ones(6, bool), kernel=kernel)
    np.testing.assert_allclose(one.kernel, kernel, atol=1e-5)
    twin = rng.normal(size=(500, 3)).astype(np.float32)
    both = np.concatenate([twin, twin], axis=1)  # singular: duplicated rows
    found = refit(
        moments_of(both, both @ kernel), np.arange(6) < 3, kernel=kernel, ridge=1e-6
    )
    np.testing.assert_allclose(found.kernel[:3], kernel[:3] + kernel[3:], atol=2e-4)
    constant = refit(moments_of(both, np.full((500, 2), 4.0)), np.ones(6, bool))
    np.testing.assert_allclose(constant.intercept, 4.0, rtol=1e-5)
    assert not constant.residual.any()
    with pytest.raises(ScoreError, match=r"row_keep \(6,\)"):
        refit(dead, np.ones(5, bool))


@pytest.mark.parametrize("loud", [30, 1e3, 1e6])
def test_a_loud_channel_leaves_the_refit_of_the_others_alone(loud):
    """The same function with one channel scaled, its weights by the inverse."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(4096, 12)) @ rng.normal(size=(12, 64))
    x = np.maximum(mixed + 0.3 * rng.normal(size=mixed.shape), 0)
    kernel = rng.normal(size=(64, 16))
    keep = rng.permutation(64) < 40
    keep[0] = True
    errors, orders = [], []
    for by in (1.0, loud):
        scale = np.r_[by, np.ones(63)]
        moments = moments_of(x * scale, x @ kernel)
        prior = kernel / scale[:, None]
        errors.append(refit(moments, keep, kernel=prior).residual.mean())
        terms = [(moments, prior, np.arange(64), None)]
        orders.append(set(elimination_order(terms, 64, 32)))
    none = relative_residual(moments, prior * keep[:, None]).mean()
    assert errors[1] < errors[0] * 1.02 < none / 2
    assert len(orders[0] & orders[1]) >= 31


def test_a_constant_but_for_rounding_keeps_its_weights():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20000, 6))
    x[:, 2] = 1 + 1e-6 * rng.normal(size=20000)
    kernel = rng.normal(size=(6, 3))
    y = x @ kernel + 0.1 * rng.normal(size=(20000, 3))
    found = refit(moments_of(x, y), np.ones(6, bool), kernel=kernel)
    np.testing.assert_allclose(found.kernel[2], kernel[2], atol=1e-3)


def test_prior_helps_with_few_samples():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(4000, 60)) @ rng.normal(size=(60, 60)) / 8
    kernel = rng.normal(size=(60, 4))
    y = x @ kernel + 0.5 * rng.normal(size=(4000, 4))
    keep = np.arange(60) < 50
    few, test = moments_of(x[:70], y[:70]), moments_of(x[2000:], y[2000:])

    def loss(**options):
        found = refit(few, keep, **options)
        return relative_residual(test, found.kernel).mean()

    assert loss(kernel=kernel) < loss(kernel=kernel, ridge=0.0)
    assert loss(kernel=kernel, ridge=0.1) < loss(ridge=0.1)
    assert loss(kernel=kernel) < loss(kernel=kernel, ridge=1e-3)
    assert default_ridge(10**9, 50) == 1e-6 and default_ridge(1, 50) == 0.5
    assert default_ridge(5000, 50) == pytest.approx(5e-3)
