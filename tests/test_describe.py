"""print(graph) and explain() of deep networks fit on a screen."""

import jax
import jax.numpy as jnp
import pytest

import jaxprune as jp
from jaxprune import models


@pytest.fixture(scope="module")
def graphs():
    found = {}
    for name in ("resnet50", "vit_b16"):
        model = models.create(name)
        x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        found[name] = jp.trace(model, variables, x)
    return found


def test_repeated_blocks_share_a_line(graphs):
    lines = str(graphs["resnet50"]).splitlines()
    assert lines[0] == (
        "ChannelGraph: 37 groups, 11456 channels, 4,089,184,256 MACs, 25,557,032 "
        "parameters"
    )
    assert len(lines) < 16
    assert any(
        line.split()
        == "block7/conv1 .. block12/conv2 (12 groups) 256 made by "
        "block*/conv*/kernel; read by block*/conv*/kernel".split()
        for line in lines
    )
    # Every group is counted once: alone on a line, or in a line's number of groups.
    shown = lines[1 : lines.index("frozen:")]
    counts = [int(s.split("(")[1].split()[0]) if " groups)" in s else 1 for s in shown]
    assert sum(counts) == 37


def test_explain_gathers_what_repeats(graphs):
    text = graphs["vit_b16"].explain("params/block0/attention/query/kernel")
    assert "axis 0 (768) belongs to group 'patch' of 768 channels" in text
    assert "params/block*/mlp/hidden/kernel axis 0 (consumer) in 12 places" in text
    assert "params/linear/kernel axis 0 (consumer)" in text
    assert len(text) < 2500
