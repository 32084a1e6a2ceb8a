"""Streaming statistics against whole-array float64 ones, for any split."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.stats import activations as act
from jaxprune.stats import moments as mom
from jaxprune.stats.patches import example_positions, gather_patches, gather_positions

update = jax.jit(mom.update)


def data(n=4096, rows=24, outputs=5, seed=0):
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(1.0, 2.0, (n, rows)), 0).astype(np.float32)
    y = (x @ rng.normal(size=(rows, outputs)) + 3.0).astype(np.float32)
    return x, y


def stream(x, y, split):
    m = mom.zeros(x.shape[1], y.shape[1])
    for start in range(0, len(x), split):
        m = update(m, x[start : start + split], y[start : start + split])
    return m


def exact(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    cx, cy, n = x - x.mean(0), y - y.mean(0), len(x)
    return n, x.mean(0), y.mean(0), cx.T @ cx / n, cx.T @ cy / n, y.var(0)


def close(found, true, rtol=1.5e-6):
    for a, b in zip(found, true, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("split", [1, 7, 64, 4096])
def test_moments_do_not_depend_on_the_batch_split(split):
    x, y = data(n=512 if split == 1 else 4096)
    close(mom.covariances(stream(x, y, split)), exact(x, y))


def test_two_words_are_needed_for_long_streams():
    """One float32 word drifts where the compensated sum stays exact."""
    low, high = np.float32([[0.0]]), np.float32([[1.1]])
    plain, m = np.float32(0), mom.zeros(1, 1)
    for step in range(4000):
        m = update(m, high if step % 2 else low, low)
        plain = np.float32(plain + (high[0, 0] if step % 2 else 0) ** 2)
    truth = 2000 * float(high[0, 0]) ** 2
    found = mom.covariances(m, centred=False)
    np.testing.assert_allclose(found.xx[0, 0] * 4000, truth, rtol=1e-7)
    assert abs(plain - truth) > 1e-6 * truth


@pytest.mark.parametrize("rows", [4 * mom.BLOCK, 6 * mom.BLOCK + 5])
def test_batches_of_many_blocks(rows):
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (rows, 5)).astype(np.float32)
    y = (x[:, :2] * 2 + 1).astype(np.float32)
    weight = rng.integers(0, 3, rows).astype(np.float32)
    found = mom.covariances(jax.jit(mom.update)(mom.zeros(5, 2), x, y, weight))
    x, y = (np.repeat(a.astype(np.float64), weight.astype(int), 0) for a in (x, y))
    assert found.count == len(x)
    np.testing.assert_allclose(found.mean_x, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.xx, np.cov(x.T, bias=True), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.yy, y.var(0), rtol=1e-5)


def test_variance_beside_a_large_mean():
    """Uncentred float32 sums fail here; one sample has no variance at all."""
    x, y = data()
    x = x / 10 + 400
    close(mom.covariances(stream(x, y, 100)), exact(x, y), rtol=1e-6)
    raw = x.T @ x / len(x) - np.outer(x.mean(0), x.mean(0))
    assert np.abs(raw - exact(x, y)[3]).max() > 1e-3 * exact(x, y)[3].max()
    single = mom.covariances(stream(x[:1], y[:1], 1))
    assert not single.xx.any() and not single.yy.any()


def test_merge_and_weights():
    x, y = data(n=100)
    whole = exact(x, y)
    merged = mom.merge(stream(x[:30], y[:30], 30), stream(x[30:], y[30:], 9))
    padded = np.concatenate([x, np.full((28, 24), 1e3, np.float32)])
    padded_y = np.concatenate([y, np.full((28, 5), 1e3, np.float32)])
    weight = (np.arange(128) < 100).astype(np.float32)
    weighted = update(mom.zeros(24, 5), padded, padded_y, weight)
    close(mom.covariances(merged), whole)
    close(mom.covariances(weighted), whole, rtol=1e-6)


def test_means_alone_are_those_of_the_whole_moments():
    x, y = data(n=100)
    means = mom.zeros(24, 5, second=False)
    for start in range(0, 100, 30):
        part = slice(start, start + 30)
        means = update(means, x[part], y[part], np.ones(len(x[part]), np.float32))
    assert means.xx.shape == (0, 0) and means.xy.shape == (0, 5)
    found, whole = mom.covariances(means), exact(x, y)
    np.testing.assert_allclose(found.mean_x, whole[1], rtol=1e-6)
    np.testing.assert_allclose(found.mean_y, whole[2], rtol=1e-6)
    np.testing.assert_allclose(found.yy, whole[5], rtol=1e-5)


def test_uncentred_and_empty_covariances():
    x, y = data()
    found = mom.covariances(stream(x, y, 512), centred=False)
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    assert not found.mean_x.any() and not found.mean_y.any()
    np.testing.assert_allclose(found.xx, x64.T @ x64 / len(x), rtol=1e-5)
    np.testing.assert_allclose(found.yy, (y64**2).mean(0), rtol=1e-6)
    empty = mom.covariances(mom.zeros(3, 2))
    assert empty.count == 0 and not empty.xx.any() and not empty.yy.any()


EIGHT = """
import jax, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from jaxprune.stats import moments as mom
assert jax.device_count() == 8
rng = np.random.default_rng(0)
x = rng.normal(1, 2, (4096, 16)).astype(np.float32)
y = (x[:, :3] * 2 + 1).astype(np.float32)
mesh = Mesh(np.array(jax.devices()), ("d",))
def local(x, y):
    m = mom.zeros(16, 3)
    for part in range(4):
        m = mom.update(m, x[part::4], y[part::4])
    return mom.psum(m, "d")
sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("d"), P("d")),
                                out_specs=P(), check_vma=False))
eight = mom.covariances(sharded(x, y))
one = mom.covariances(mom.update(mom.zeros(16, 3), x, y))
x, y = x.astype(np.float64), y.astype(np.float64)
cx, cy, n = x - x.mean(0), y - y.mean(0), len(x)
true = n, x.mean(0), y.mean(0), cx.T @ cx / n, cx.T @ cy / n, y.var(0)
for a, b, c in zip(eight, one, true):
    scale = np.abs(c).max()
    assert np.abs(a - c).max() <= 3e-7 * scale, np.abs(a - c).max() / scale
    assert np.abs(a - b).max() <= 5e-7 * scale
print("equal")
"""


def test_one_device_equals_eight():
    flags = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", EIGHT],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "equal"


@pytest.mark.parametrize(
    "spatial, window, strides, padding, dilation, lhs",
    [
        ((13,), (3,), (2,), "SAME", (2,), (1,)),
        ((7, 9), (3, 3), (1, 1), "SAME", (1, 1), (1, 1)),
        ((8, 9), (3, 2), (2, 1), [(1, 1), (0, 2)], (1, 2), (1, 1)),
        ((8, 8), (5, 5), (1, 1), "VALID", (1, 1), (1, 1)),
        ((4, 5), (3, 3), (1, 1), [(1, 2), (1, 2)], (1, 1), (2, 2)),
        ((5, 6, 7), (3, 1, 2), (1, 2, 2), "SAME", (1, 1, 1), (1, 1, 1)),
    ],
)
def test_patches_times_kernel_is_the_convolution(
    spatial, window, strides, padding, dilation, lhs
):
    rng = np.random.default_rng(1)
    nd = len(spatial)
    x = jnp.asarray(rng.normal(size=(3, *spatial, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(*window, 4, 6)), jnp.float32)
    letters = "XYZ"[:nd]
    spec = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    out = jax.lax.conv_general_dilated(
        x, kernel, strides, padding, lhs, dilation, dimension_numbers=spec
    )
    options = {
        "window": window,
        "strides": strides,
        "padding": padding,
        "rhs_dilation": dilation,
        "lhs_dilation": lhs,
    }
    keys = jax.random.split(jax.random.key(1), 3)
    everywhere = example_positions(keys, out.shape[1:-1], None)
    rows = gather_patches(x, everywhere, **options)
    np.testing.assert_allclose(
        rows @ kernel.reshape(-1, 6), out.reshape(-1, 6), atol=1e-4
    )
    own = example_positions(keys, out.shape[1:-1], 4)
    rows = gather_patches(x, own, **options)
    np.testing.assert_allclose(
        rows @ kernel.reshape(-1, 6), gather_positions(out, own), atol=1e-4
    )


def test_sampled_positions_are_distinct_and_seeded():
    key = jax.random.split(jax.random.key(3), 1)
    some = np.asarray(example_positions(key, (6, 7), 10))[0]
    assert some.shape == (10, 2) and len(np.unique(some, axis=0)) == 10
    assert some.max(0)[0] < 6 and some.max(0)[1] < 7
    np.testing.assert_array_equal(some, example_positions(key, (6, 7), 10)[0])
    drawn = np.asarray(example_positions(jax.random.split(key[0], 4000), (3, 5), 4))
    counts = np.zeros((3, 5))
    np.add.at(counts, tuple(drawn.reshape(-1, 2).T), 1)
    np.testing.assert_allclose(counts / 4000, 4 / 15, atol=0.03)  # 4 deviations
    every = np.asarray(example_positions(key, (2, 3), 99))
    assert every.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


@pytest.mark.parametrize("split", [3, 50, 200])
def test_activation_statistics(split):
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=(200, 4, 4, 6)) + np.arange(6) * 10, 9).astype("f4")
    x[..., 0] = np.maximum(x[..., 0] - 9, 0)
    stats = act.stats_zeros(6)
    for start in range(0, 200, split):
        stats = jax.jit(act.stats_update)(stats, x[start : start + split])
    flat = x.reshape(-1, 6).astype(np.float64)
    assert int(stats.count) == len(flat)
    np.testing.assert_allclose(stats.mean, flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.variance, flat.var(0), rtol=1e-5)
    np.testing.assert_allclose(stats.mean_abs, np.abs(flat).mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.zero_fraction, (flat == 0).mean(0), rtol=1e-6)
    np.testing.assert_array_equal(stats.min, flat.min(0).astype("f4"))
    np.testing.assert_array_equal(stats.max, flat.max(0).astype("f4"))


def test_pearson_with_a_large_offset_and_a_dead_channel():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 5)) @ rng.normal(size=(5, 5)) + 300
    x[:, 4] = 7.1
    x = x.astype(np.float32)
    moments = act.comoments_zeros(5)
    for start in range(0, 1000, 170):
        moments = jax.jit(act.comoments_update)(moments, x[start : start + 170])
    found = act.pearson(moments)
    true = np.corrcoef(x[:, :4].T.astype(np.float64))
    np.testing.assert_allclose(found[:4, :4], true, atol=2e-5)
    assert not found[4].any() and not found[:, 4].any()
    raw = x[:, :4]
    naive = raw.T @ raw / 1000 - np.outer(raw.mean(0), raw.mean(0))  # float32
    naive /= np.sqrt(np.outer(np.diag(naive), np.diag(naive)))
    assert np.abs(naive - true).max() > 2e-4  # the uncentred sums do not pass


def test_histogram_equals_digitize_for_any_split():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 3)).astype(np.float32)
    x[:, 2] = np.round(x[:, 2], 1)  # values that lie on edges
    edges = np.stack([np.linspace(c.min(), c.max(), 11) for c in x.T.astype("f8")])
    parts = []
    for chunk in np.split(x, [400]):
        h = act.histogram_zeros(edges)
        parts.append(jax.jit(act.histogram_update)(h, chunk))
    counts = act.histogram_counts(act.histogram_merge(*parts))
    for c in range(3):
        classes = np.digitize(x[:, c].astype("f8"), edges[c])
        np.testing.assert_array_equal(counts[c], np.bincount(classes, minlength=12))
    with pytest.raises(act.ScoreError, match="different edges"):
        act.histogram_merge(parts[0], act.histogram_zeros(edges + 1))
