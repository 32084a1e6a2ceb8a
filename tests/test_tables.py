"""What only a replay shrinks: positions, tables of constants, cuts into unequal parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import random_plan

import jaxprune as jp
from jaxprune.frameworks import replay as rewriting

WIDTH, HEADS, LENGTH = 8, 2, 6


def _angles(positions):
    half = WIDTH // 2
    scale = 100.0 ** -(jnp.arange(half) / half)
    angle = positions[:, None, None] * scale
    return jnp.sin(angle), jnp.cos(angle)


def _halves(x, positions):
    sin, cos = _angles(positions)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _pairs(x, positions):
    sin, cos = (jnp.repeat(y, 2, -1) for y in _angles(positions))
    turned = jnp.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return x * cos + turned * sin


def _complex(x, positions):
    sin, cos = _angles(positions)
    y = jax.lax.complex(x[..., ::2], x[..., 1::2]) * jax.lax.complex(cos, sin)
    return jnp.stack([y.real, y.imag], -1).reshape(x.shape)


_TABLE = np.random.default_rng(2).normal(size=(32, 1, WIDTH)).astype(np.float32)


def _table(x, positions):
    sin, cos = jnp.split(jnp.take(jnp.asarray(_TABLE), positions, axis=0), 2, -1)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


ROTATIONS = {"halves": _halves, "pairs": _pairs, "complex": _complex, "table": _table}


def _attention(rotate):
    def apply(params, x):
        positions = jnp.arange(x.shape[1])
        q, k, v = (
            (x @ params[name]).reshape(*x.shape[:2], HEADS, -1) for name in "qkv"
        )
        q, k = rotate(q, positions), rotate(k, positions)
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return y.reshape(*x.shape[:2], -1) @ params["o"]

    return apply


def _params(*names):
    rng = np.random.default_rng(0)
    shapes = {"o": (HEADS * WIDTH, 5)}
    return {
        name: jnp.asarray(
            rng.normal(size=shapes.get(name, (7, HEADS * WIDTH))), jnp.float32
        )
        for name in names
    }


X = jnp.asarray(np.random.default_rng(1).normal(size=(2, LENGTH, 7)), jnp.float32)


@pytest.mark.parametrize("name", list(ROTATIONS))
def test_rotary_pairs_go_together_under_replay(name):
    apply, params = _attention(ROTATIONS[name]), _params(*"qkvo")
    frozen = jp.trace(apply, params, X)
    assert not any(g.size == WIDTH // 2 for g in frozen.groups), frozen
    graph = jp.trace(apply, params, X, replay=True)
    pairs = [g for g in graph.groups if g.size == WIDTH // 2]
    assert {s.path for g in pairs for s in g.slots} == {"q", "k"}
    first = next(s for s in pairs[0].slots if s.path == "q").index[0]
    partner = 1 if name in ("pairs", "complex") else WIDTH // 2
    assert first.tolist() == [0, partner, WIDTH, WIDTH + partner]
    for seed in range(2):
        plan = random_plan(graph, seed)
        slim = jp.shrink(graph, plan)
        assert slim.report["left_whole"] == {}
        assert jp.verify(graph, plan, X, tolerance=1e-5) < 1e-4
    # Another batch size and length.
    assert jp.verify(graph, plan, jnp.tile(X, (2, 2, 1))[:3, :9]) < 1e-4


def test_removed_pairs_are_the_original_with_its_queries_at_zero():
    """The truth without the graph's own oracle: full size, zeroed by hand."""
    apply, params = _attention(_halves), _params(*"qkvo")
    graph = jp.trace(apply, params, X, replay=True)
    group = next(g for g in graph.groups if g.size == WIDTH // 2)
    slim = jp.shrink(graph, {group.name: [0, 3]})
    masked = {k: np.array(v) for k, v in params.items()}
    for slot in group.slots:
        masked[slot.path][:, slot.index[[1, 2]].ravel()] = 0
    np.testing.assert_allclose(
        slim.model(slim.variables, X), apply(masked, X), atol=1e-5
    )


def test_sinusoidal_positions_do_not_hold_the_stream():
    table = np.asarray(_TABLE[:LENGTH, 0])

    def apply(params, x):
        h = x @ params["in"] + table
        h = h + jax.nn.relu(h @ params["up"]) @ params["down"]
        return h @ params["out"]

    rng = np.random.default_rng(0)
    shapes = {"in": (7, 8), "up": (8, 10), "down": (10, 8), "out": (8, 3)}
    params = {
        k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()
    }
    frozen = jp.trace(apply, params, X)
    assert {g.size for g in frozen.groups} == {10}
    assert "trace(replay=True)" in frozen.explain("in")
    graph = jp.trace(apply, params, X, replay=True)
    assert {g.size for g in graph.groups} == {8, 10}
    assert jp.verify(graph, random_plan(graph), X) < 1e-4


def test_emission_leaves_what_would_be_counted_anew():
    """Angles of a narrower source are others: as wide, but not those that were kept."""
    apply, params = _attention(_halves), _params(*"qkvo")
    graph = jp.trace(apply, params, X, replay=True)
    pairs = next(g.name for g in graph.groups if g.size == WIDTH // 2)

    def follows(params, x):  # the width is read off the arrays
        half = params["q"].shape[-1] // HEADS // 2
        angle = jnp.arange(x.shape[1])[:, None, None] * jnp.arange(half)
        sin, cos = jnp.sin(angle), jnp.cos(angle)

        def rotate(y, _):
            a, b = jnp.split(y, 2, -1)
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        return _attention(rotate)(params, x)

    graph = jp.trace(follows, params, X, replay=True)
    pairs = next(g.name for g in graph.groups if g.size == WIDTH // 2)
    slim = jp.shrink(graph, {pairs: [1, 2]}, replay=False)
    assert "counted anew" in slim.report["left_whole"][pairs]
    assert slim.variables["q"].shape == params["q"].shape


def test_positions_that_are_counted_anew_are_found(monkeypatch):
    """A replay, or a static check, that lets them through is caught by the proof."""
    apply, params = _attention(_halves), _params(*"qkvo")
    graph = jp.trace(apply, params, X, replay=True)
    pairs = next(g.name for g in graph.groups if g.size == WIDTH // 2)

    def anew(eqn):
        return np.broadcast_to(np.zeros((), eqn.params["dtype"]), eqn.params["shape"])

    monkeypatch.setattr(rewriting, "_iota", anew)
    with pytest.raises(jp.PruneError, match="differs from the masked original"):
        jp.verify(graph, {pairs: [1, 2]}, X)


PERM = np.random.default_rng(3).permutation(12)
SWAPS = np.arange(12).reshape(6, 2)[:, ::-1].ravel()
# What of 12 channels is picked: by whom it is read, and the numbers picked.
PICKS = {
    "indices": (lambda x: x[:, PERM], PERM),
    "take": (lambda x: jnp.take(x, PERM[:8], axis=1), PERM[:8]),
    "negative and twice": (lambda x: x[:, np.array([-1, 3, 5, 3])], [11, 3, 5, 3]),
    "counted backwards": (lambda x: x[:, jnp.arange(12)[::-1]], np.arange(12)[::-1]),
    "turned": (lambda x: x[:, (jnp.arange(12) + 5) % 12], np.roll(np.arange(12), -5)),
    "along": (lambda x: jnp.take_along_axis(x, jnp.asarray(PERM)[None], 1), PERM),
    "in a loop": (
        lambda x: jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y[:, SWAPS]), x),
        SWAPS,
    ),
}


@pytest.mark.parametrize("name", list(PICKS))
def test_channels_picked_by_number_under_replay(name):
    pick, picked = PICKS[name]

    def apply(params, x):
        return pick(jnp.tanh(x @ params["in"])) @ params["out"]

    rng = np.random.default_rng(0)
    shapes = {"in": (7, 12), "out": (len(picked), 3)}
    params = {
        k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()
    }
    frozen = jp.trace(apply, params, X[0])
    assert "indexed" in frozen.explain("in") or name == "in a loop"
    assert not frozen.groups
    graph = jp.trace(apply, params, X[0], replay=True)
    rng = np.random.default_rng(1)
    plan = {g.name: rng.permutation(g.size)[: g.size // 2] for g in graph.groups}
    slim = jp.shrink(graph, plan)
    assert slim.variables["in"].shape[1] <= 7
    masked = {k: np.array(v) for k, v in params.items()}
    for group in graph.groups:
        gone = np.setdiff1d(np.arange(group.size), plan[group.name])
        for slot in group.slots:
            view = np.moveaxis(masked[slot.path], slot.axis, 0)
            view[slot.index[gone].ravel()] = 0
    expected = apply({k: jnp.asarray(v) for k, v in masked.items()}, X[0])
    np.testing.assert_allclose(slim.model(slim.variables, X[0]), expected, atol=1e-5)
    assert jp.verify(graph, plan, X[1], replay=True) < 1e-5
    kept = jp.kept_indices(graph, plan)
    columns, rows = kept["in"][1], np.asarray(picked)[kept["out"][0]]
    assert set(rows) == {*columns}.intersection(picked)
    whole = jp.shrink(graph, plan, replay=False)  # the source states the numbers
    assert whole.variables["in"].shape[1] == 12
    assert whole.report["left_whole"]


def test_numbers_that_still_fit_point_at_other_channels():
    """What is picked all stays, so that a smaller source would run: on wrong channels."""

    def apply(params, x):
        return jnp.tanh(x @ params["in"])[:, np.array([0, 5])] @ params["out"]

    params = {
        "in": jnp.ones((7, 12)).at[0].set(jnp.arange(12)),
        "out": jnp.ones((2, 3)),
    }
    graph = jp.trace(apply, params, X[0], replay=True)
    unread = next(g for g in graph.groups if g.size == 10)
    plan = {unread.name: np.arange(4, 10)}  # without channels 1 to 4
    slim = jp.shrink(graph, plan, replay=False)
    assert "by their numbers" in slim.report["left_whole"][unread.name]
    assert jp.shrink(graph, plan).variables["in"].shape == (7, 8)
    assert jp.verify(graph, plan, X[0]) < 1e-5


QUERY, VALUE = 4 * WIDTH, 2 * WIDTH  # four heads of queries, two of keys and values


def _fused(params, x):
    """Grouped queries of one fused projection, whose parts the source states."""
    q, k, v = jnp.split(x @ params["qkv"], [QUERY, QUERY + VALUE], -1)
    q = q.reshape(*x.shape[:2], 2, 2, WIDTH)
    k, v = (y.reshape(*x.shape[:2], 2, WIDTH) for y in (k, v))
    weights = jax.nn.softmax(jnp.einsum("bqghd,bkgd->bghqk", q, k))
    y = jnp.einsum("bghqk,bkgd->bqghd", weights, v)
    return y.reshape(*x.shape[:2], -1) @ params["out"]


def _fused_params():
    rng = np.random.default_rng(0)
    shapes = {"qkv": (7, QUERY + 2 * VALUE), "out": (QUERY, 5)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def test_unequal_parts_of_a_fused_projection_shrink_under_replay():
    params = _fused_params()
    frozen = jp.trace(_fused, params, X)
    assert not frozen.groups  # 32, 16 and 16 of 64: four quarters, tied
    graph = jp.trace(_fused, params, X, replay=True)
    # Widths of queries and keys, of values, the query heads of a group, the groups.
    assert sorted(g.size for g in graph.groups) == [2, 2, WIDTH, WIDTH]
    for seed in range(3):
        plan = random_plan(graph, seed)
        slim = jp.shrink(graph, plan)
        assert slim.report["left_whole"] == {}
        assert jp.verify(graph, plan, X) < 1e-4


def test_removed_query_columns_are_the_original_with_them_at_zero():
    params = _fused_params()
    graph = jp.trace(_fused, params, X, replay=True)
    columns = {g.name: g.slots[0].index for g in graph.groups if g.size == WIDTH}
    name = next(n for n, index in columns.items() if (index < QUERY).any())
    gone = columns[name][[1, 4, 5]].ravel()
    assert (gone < QUERY + VALUE).all()
    assert gone.size == 3 * 6
    slim = jp.shrink(graph, {name: [0, 2, 3, 6, 7]})
    masked = {**params, "qkv": params["qkv"].at[:, gone].set(0)}
    np.testing.assert_allclose(
        slim.model(slim.variables, X), _fused(masked, X), atol=1e-5
    )


def test_positions_that_no_input_reached_stay():
    def apply(params, x):
        table = params["positions"]
        first = x[:, :1] + table[:1]
        rest = x[:, 1:] + table[1 : x.shape[1]]
        return jnp.concatenate([first, rest], 1) @ params["out"]

    params = {"positions": jnp.ones((32, 7)), "out": jnp.ones((7, 3))}
    graph = jp.trace(apply, params, X, replay=True)
    assert not any(s.path == "positions" for g in graph.groups for s in g.slots)
    assert "not part of any slice" in graph.explain("positions")


def test_a_part_that_nobody_reads_can_go():
    def apply(params, x):
        h = x @ params["in"]
        return h[..., :3] @ params["out"]

    params = {"in": jnp.ones((7, 8)), "out": jnp.ones((3, 2))}
    assert "trace(replay=True)" in jp.trace(apply, params, X).explain("in")
    graph = jp.trace(apply, params, X, replay=True)
    assert sorted(g.size for g in graph.groups) == [3, 5]
    for seed in range(3):
        assert jp.verify(graph, random_plan(graph, seed), X) < 1e-5


def test_a_replay_outlives_the_jit_that_met_its_inputs_first():
    """The tables cut for inputs of a shape are kept: they may be of no one trace."""
    table = jnp.linspace(-1.0, 1.0, WIDTH)
    params = {"up": jnp.ones((3, WIDTH)), "down": jnp.ones((WIDTH, 2))}

    def call(params, x):
        return jnp.tanh(x @ params["up"] * table) @ params["down"]

    x = jax.random.normal(jax.random.key(0), (4, 3))
    graph = jp.trace(call, params, x, replay=True)
    kept = np.array([0, 1, 5])
    slim = jp.shrink(graph, {graph.groups[0].name: kept})
    first = jax.jit(slim.model)(slim.variables, x)
    expected = jnp.tanh(x @ params["up"][:, kept] * table[kept]) @ jnp.ones((3, 2))
    np.testing.assert_allclose(first, expected, rtol=1e-6)
    np.testing.assert_allclose(slim.model(slim.variables, x), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(slim.model)(slim.variables, x), first)
