"""Pruning where a process has several devices, which share every calibration batch."""

import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import trees

METHODS = {
    "cpli": {"allocation": "uniform"},
    "fisher": {},
    "importance_redundancy": {},
}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(True)(nn.Conv(8, (3, 3))(x)))
        x = nn.relu(nn.Conv(12, (3, 3))(x)).mean((1, 2))
        return nn.Dense(5)(x)


def pruned():
    """{"method: group" or "method: leaf": array}."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 8, 8, 3)).astype(np.float32)
    y = rng.integers(0, 5, 60)
    variables = Net().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    found = {}
    for method, options in METHODS.items():
        batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 60, 16)]
        slim = jp.prune(Net(), variables, batches, method=method, macs=0.5, **options)
        for name, kept in slim.plan.items():
            found[f"{method}: {name}"] = kept
        for path, leaf in trees.flatten(slim.variables).items():
            found[f"{method}: {path}"] = np.asarray(leaf)
    return found


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    file = tmp_path_factory.mktemp("eight") / "pruned.npz"
    tests = pathlib.Path(__file__).parent
    script = (
        "import jax, numpy as np; from test_devices import pruned; "
        f"assert jax.device_count() == 8; np.savez({str(file)!r}, **pruned())"
    )
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join((str(tests), str(tests.parent))),
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(file))


def test_eight_devices_prune_as_one_does(eight):
    one = pruned()
    assert one.keys() == eight.keys()
    for name, value in one.items():
        np.testing.assert_allclose(
            eight[name], value, rtol=1e-3, atol=1e-4, err_msg=name
        )
