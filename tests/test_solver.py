"""The solver against scikit-learn, float64 lstsq and explicit sample matrices."""

import itertools
import time

import numpy as np
import pytest
from sklearn.linear_model import Lasso
from zoo import gate_data, moments_of

from jaxprune.errors import ScoreError
from jaxprune.solver.cpli import cpli_select, scaled_scores, suppression
from jaxprune.solver.gram import combine, gate_system
from jaxprune.solver.lasso import lasso, select_exact
from jaxprune.solver.refit import refit


def problem(channels, samples, seed=0):
    rng = np.random.default_rng(seed)
    mix = np.eye(channels) + rng.normal(size=(channels, channels)) / channels**0.5
    x = rng.normal(size=(samples, channels)) @ mix
    y = x @ rng.normal(0.5, 1, size=channels) + rng.normal(size=samples)
    return x, y, x.T @ x / samples, x.T @ y / samples


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("channels, samples", [(1, 6), (12, 60), (50, 30), (90, 800)])
def test_lasso_equals_scikit_learn(channels, samples, nonnegative):
    x, y, gram, linear = problem(channels, samples)
    for share in (0.7, 0.1, 0.01):
        lam = share * np.abs(linear).max()
        model = Lasso(
            lam, positive=nonnegative, fit_intercept=False, tol=1e-12, max_iter=10**6
        )
        found = lasso(gram, linear, lam, nonnegative=nonnegative)
        np.testing.assert_allclose(found, model.fit(x, y).coef_, atol=1e-7)
    assert not lasso(gram, linear, 1.01 * np.abs(linear).max()).any()


@pytest.mark.parametrize("seed", [94, 95, 96])
def test_a_gate_that_left_may_come_back_with_the_other_sign(seed):
    """Correlated channels, a path of many exits (seed 94: one turns round at once)."""
    rng = np.random.default_rng(seed)
    channels, samples = int(rng.integers(5, 40)), 200
    inner = max(2, channels // 3)
    x = rng.normal(size=(samples, inner)) @ rng.normal(size=(inner, channels))
    x += 0.05 * rng.normal(size=x.shape)
    y = x @ rng.normal(size=channels)
    gram, linear = x.T @ x / samples, x.T @ y / samples
    for share in 10 ** np.linspace(-0.3, -4, 40):
        lam = share * np.abs(linear).max()
        gates = lasso(gram, linear, lam, nonnegative=False)
        slack, on = linear - gram @ gates, gates != 0
        assert np.abs(slack).max() <= lam * (1 + 1e-6)
        np.testing.assert_allclose(slack[on], lam * np.sign(gates[on]), rtol=1e-6)


@pytest.mark.parametrize("nonnegative", [True, False])
def test_selection_is_a_lasso_solution_with_the_exact_count(nonnegative):
    x, y, gram, linear = problem(40, 400)
    reached = int((lasso(gram, linear, 1e-9, nonnegative=nonnegative) != 0).sum())
    for keep in range(1, reached):
        found = select_exact(gram, linear, keep, nonnegative=nonnegative)
        np.testing.assert_array_equal(found.kept, np.flatnonzero(found.gates))
        assert found.kept.size == keep and found.lam > 0
        model = Lasso(
            found.lam, positive=nonnegative, fit_intercept=False, tol=1e-13,
            max_iter=10**6,
        )  # fmt: skip
        np.testing.assert_allclose(found.gates, model.fit(x, y).coef_, atol=1e-6)


def test_optimality_conditions_at_512_and_speed():
    rng = np.random.default_rng(1)
    x = np.maximum(rng.normal(size=(1000, 200)) @ rng.normal(size=(200, 512)), 0)
    gram = x.T @ x / 1000
    gram /= np.diag(gram).mean()
    linear = gram.sum(1)
    start = time.perf_counter()
    found = select_exact(gram, linear, 256)
    seconds = time.perf_counter() - start
    slack = linear - gram @ found.gates
    active = found.gates > 0
    assert active.sum() == 256
    np.testing.assert_allclose(slack[active], found.lam, rtol=1e-8)
    assert (slack[~active] <= found.lam * (1 + 1e-8)).all()
    assert seconds < 5  # 0.03 s on an idle machine


def test_ties_duplicates_and_dead_channels():
    gram = np.eye(6)
    linear = np.ones(6)  # every gate reaches lambda at once
    assert select_exact(gram, linear, 3).kept.tolist() == [0, 1, 2]
    tie = np.array([0, 1, 0, 5, 1, 0.0])
    assert select_exact(gram, linear, 3, tie_break=tie).kept.tolist() == [1, 3, 4]

    x, y, _, _ = problem(8, 200)
    x = np.concatenate([x, x[:, :4], np.zeros((200, 2))], axis=1)  # copies, then dead
    y = x[:, :8].sum(1)
    gram, linear = x.T @ x / 200, x.T @ y / 200
    found = select_exact(gram, linear, 8)
    assert found.kept.tolist() == list(range(8))  # one of each pair, the first
    more = select_exact(gram, linear, 10)
    assert more.kept.size == 10 and np.count_nonzero(more.gates) == 8
    assert not {12, 13} & set(more.kept.tolist())
    last = select_exact(gram, linear, 13, tie_break=np.arange(14.0))
    assert last.kept.size == 13


@pytest.mark.parametrize("size", [1, 2, 5])
def test_degenerate_systems(size):
    zero = np.zeros((size, size))
    assert select_exact(zero, np.zeros(size), 1).kept.tolist() == [0]
    whole = select_exact(np.eye(size), np.ones(size), size)
    assert whole.kept.tolist() == list(range(size)) and (whole.gates == 1).all()
    unwanted = select_exact(np.eye(size + 1), -np.ones(size + 1), 1)
    assert unwanted.kept.tolist() == [0] and not unwanted.gates.any()


def test_channels_with_energy_fill_up_before_dead_ones():
    gram = np.diag([1.0, 0.0, 1.0, 0.0])  # 1 and 3 are dead, the LASSO wants only 2
    found = select_exact(gram, np.array([-1.0, 0.0, 1.0, 0.0]), 2)
    assert found.kept.tolist() == [0, 2] and found.gates.tolist()[0] == 0


def test_4096_channels():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 4096)).astype(np.float32)
    gram = (x.T @ x / 1500).astype(np.float64)
    found = select_exact(gram, gram.sum(1), 300)
    assert found.kept.size == 300 and np.count_nonzero(found.gates) == 300


def test_selection_errors():
    with pytest.raises(ScoreError, match=r"keep must lie in 1\.\.3.*found 4"):
        select_exact(np.eye(3), np.ones(3), 4)
    with pytest.raises(ScoreError, match="NaN or infinity"):
        select_exact(np.eye(3), np.array([1, np.nan, 1]), 1)
    with pytest.raises(ScoreError, match=r"gram \(C, C\)"):
        lasso(np.eye(3), np.ones(2), 0.1)


def explicit_system(x, y, kernel, row_channel, s, *, centred=True):
    """He et al.'s sample matrix: a column per channel, a row per sample and output."""
    x, y, kernel = (a.astype(np.float64) for a in (x, y, kernel))
    if centred:
        x, y = x - x.mean(0), y - y.mean(0)
    parts = [
        (x[:, row_channel == c] @ kernel[row_channel == c] * s).ravel()
        for c in range(row_channel.max() + 1)
    ]
    present = x[:, row_channel < 0] @ kernel[row_channel < 0]
    z, target = np.stack(parts, axis=1), ((y - present) * s).ravel()
    n = len(x)
    return z.T @ z / n, z.T @ target / n, target @ target / n


@pytest.mark.parametrize("centred", [True, False])
def test_gate_system_is_the_gram_of_the_sample_matrix(centred):
    x, y, kernel, row_channel, s = gate_data()
    moments = moments_of(x, y)
    found = gate_system(
        moments, kernel, row_channel, channels=7, output_weight=s, centred=centred
    )
    gram, linear, constant = explicit_system(
        x, y, kernel, row_channel, s, centred=centred
    )
    np.testing.assert_allclose(found.gram, gram, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.linear, linear, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.constant, constant, rtol=1e-5)
    wrong, _, _ = explicit_system(x, y, kernel, row_channel, s**2, centred=centred)
    assert np.abs(wrong - gram).max() > 0.1  # s and s^2 are told apart
    b = np.arange(7) / 7
    np.testing.assert_allclose(
        found.error(b), (b @ gram @ b - 2 * linear @ b + constant) / constant, rtol=1e-4
    )


def test_consumers_add_up():
    one, two = gate_data(0), gate_data(1)
    systems = [
        gate_system(moments_of(x, y), w, r, channels=7, output_weight=s)
        for x, y, w, r, s in (one, two)
    ]
    plain = combine(systems, balance=False)
    np.testing.assert_allclose(plain.gram, systems[0].gram + systems[1].gram)
    loud = systems[1]._replace(
        gram=systems[1].gram * 100,
        linear=systems[1].linear * 100,
        constant=systems[1].constant * 100,
    )
    balanced = combine(systems)
    np.testing.assert_allclose(combine([systems[0], loud]).gram, balanced.gram)
    assert balanced.constant == pytest.approx(2.0)
    with pytest.raises(ScoreError, match="a channel for each row"):
        gate_system(moments_of(one[0], one[1]), one[2], one[3][1:], channels=7)


def test_cpli_without_loss_is_the_lasso_of_he_et_al():
    x, y, kernel, row_channel, _ = gate_data(samples=2000)
    gram, linear, _ = explicit_system(x, y, kernel, row_channel, np.ones(5))
    scale = np.diag(gram).mean()
    terms = [(moments_of(x, y), kernel, row_channel, None)]
    for keep in (2, 5, 7):
        found = cpli_select(terms, np.ones(7), keep, mu=0.0, balance=False)
        again = select_exact(gram / scale, linear / scale, keep)
        np.testing.assert_array_equal(found.kept, again.kept)
        np.testing.assert_allclose(found.gates, again.gates, atol=1e-3)


def test_loss_term_and_suppression_steer_the_selection():
    x, y, kernel, row_channel, _ = gate_data(samples=2000)
    moments = moments_of(x, y)
    base = cpli_select([(moments, kernel, row_channel, None)], np.ones(7), 3)
    loser = min(set(range(7)) - set(base.kept.tolist()))
    scores = np.ones(7)
    scores[loser] = 50
    pulled = cpli_select([(moments, kernel, row_channel, None)], scores, 3, mu=3.0)
    assert loser in pulled.kept
    # A channel that feeds only features which the next stage removes is not needed.
    kernel = kernel.copy()
    kernel[row_channel == 2] *= np.array([30, 0, 0, 0, 0])
    term = moments_of(x, x @ kernel), kernel, row_channel
    s = suppression(np.array([0.1, 1, 1, 1, 1]), 4)
    assert s[0] == 0 and np.mean(s**2) == pytest.approx(1)
    assert 2 in cpli_select([(*term, None)], np.ones(7), 3, mu=0.0).kept
    assert 2 not in cpli_select([(*term, s)], np.ones(7), 6, mu=0.0).kept


def test_scores_and_suppression():
    np.testing.assert_allclose(scaled_scores([1, -3]), [0.5, -1.5])
    assert not scaled_scores(np.zeros(4)).any()
    with pytest.raises(ScoreError, match="1 values that are NaN"):
        scaled_scores([1, np.nan])
    with pytest.raises(ScoreError, match="no consumer"):
        cpli_select([], np.ones(3), 2)
    with pytest.raises(ScoreError, match=r"keep must lie in 1\.\.2"):
        suppression([1, 2], 3)
    weight = suppression([1.0, 4.0, 9.0, 0.0], 4)
    np.testing.assert_allclose(weight / weight[0], [1, 2, 3, 0])
    flat = suppression([1.0, 4.0, 9.0, 0.0], 2, importance=False, floor=0.5)
    np.testing.assert_allclose(flat / flat[1], [0.5, 1, 1, 0.5])


def test_best_subset_is_found_where_channels_are_independent():
    """With orthogonal parts the path's support is the best subset of all."""
    rng = np.random.default_rng(5)
    basis, _ = np.linalg.qr(rng.normal(size=(300, 6)))
    x = (basis - basis.mean(0)) * 17
    kernel = np.diag(rng.uniform(0.5, 3, 6))
    moments = moments_of(x, x @ kernel)
    found = cpli_select([(moments, kernel, np.arange(6), None)], np.ones(6), 3, mu=0.0)
    errors = {
        kept: refit(moments, np.isin(np.arange(6), kept), ridge=0.0).residual
        @ np.diag(kernel) ** 2
        for kept in itertools.combinations(range(6), 3)
    }
    assert tuple(found.kept) == min(errors, key=errors.get)


def test_the_same_call_gives_the_same_bits():
    _, _, gram, linear = problem(30, 100)
    first, second = (select_exact(gram, linear, 11) for _ in range(2))
    np.testing.assert_array_equal(first.gates, second.gates)
