"""NNX objects of packages: mamba2-jax and JraphX, at small sizes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jraphx.nn.models import GAT, GCN, GIN, MLP, GraphSAGE
from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

from .case import Case, Shelf, normal, tokens
from .nnx_case import case

MODELS = Shelf()


@MODELS("Mamba-2 language model (mamba2-jax)")
def mamba2() -> Case:
    config = Mamba2Config(
        vocab_size=32,
        hidden_size=32,
        state_size=8,
        head_dim=8,
        chunk_size=4,
        num_hidden_layers=2,
    )
    return case(
        lambda rngs: Mamba2ForCausalLM(config, rngs=rngs),
        tokens(2, 8),
        apply=lambda model, x: model(x)["logits"],
    )


EDGES = jnp.array([[0, 1, 1, 2, 3, 3, 4], [1, 0, 2, 3, 4, 1, 0]])


def _graph_network(kind: Any, **options: Any) -> Case:
    def make(rngs: nnx.Rngs) -> nnx.Module:
        return kind(6, 16, 3, 4, **options, rngs=rngs)

    return case(make, normal(5, 6), EDGES)


@MODELS("GCN (JraphX)")
def gcn() -> Case:
    return _graph_network(GCN)


@MODELS("GAT, two heads (JraphX)")
def gat() -> Case:
    return _graph_network(GAT, heads=2)


@MODELS("GraphSAGE, jumping knowledge (JraphX)")
def sage() -> Case:
    return _graph_network(GraphSAGE, jk="cat")


@MODELS("GIN with batch norm (JraphX)")
def gin() -> Case:
    return _graph_network(GIN, norm="batch_norm")


@MODELS("MLP with layer norm (JraphX)")
def mlp() -> Case:
    return case(
        lambda rngs: MLP([6, 24, 16, 4], norm="layer_norm", rngs=rngs), normal(3, 6)
    )
