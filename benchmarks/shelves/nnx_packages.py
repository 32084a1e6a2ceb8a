"""NNX objects of packages: jax-image-models, mamba2-jax, JraphX, at small sizes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jimm.models.clip import CLIP
from jimm.models.dinov2 import DINOv2Model
from jimm.models.dinov3 import DINOv3Model
from jimm.models.siglip import SigLIP
from jimm.models.vit import VisionTransformer
from jraphx.nn.models import GAT, GCN, GIN, MLP, GraphSAGE
from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

from .case import Case, Shelf, normal, tokens
from .nnx_examples import case

MODELS = Shelf()
_IMAGE = {"img_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 4}
_VIT = {**_IMAGE, "hidden_size": 32, "mlp_dim": 48}


@MODELS("ViT (jax-image-models)")
def vit() -> Case:
    return case(
        lambda rngs: VisionTransformer(num_classes=5, **_VIT, rngs=rngs),
        normal(2, 16, 16, 3),
    )


@MODELS("DINOv2 (jax-image-models)")
def dinov2() -> Case:
    return case(lambda rngs: DINOv2Model(**_VIT, rngs=rngs), normal(2, 16, 16, 3))


@MODELS("DINOv3, RoPE (jax-image-models)")
def dinov3() -> Case:
    return case(lambda rngs: DINOv3Model(**_VIT, rngs=rngs), normal(2, 16, 16, 3))


_TOWERS = {
    "image_resolution": 16,
    "vision_layers": 2,
    "vision_hidden_size": 64,
    "vision_patch_size": 4,
    "context_length": 8,
    "vocab_size": 32,
    "text_hidden_size": 32,
    "num_text_heads": 4,
    "num_text_layers": 2,
}


@MODELS("CLIP (jax-image-models)")
def clip() -> Case:
    return case(
        lambda rngs: CLIP(**_TOWERS, rngs=rngs), normal(2, 16, 16, 3), tokens(2, 8)
    )


@MODELS("SigLIP (jax-image-models)")
def siglip() -> Case:
    towers = {**_TOWERS, "text_hidden_size": 64}
    return case(
        lambda rngs: SigLIP(**towers, rngs=rngs), normal(2, 16, 16, 3), tokens(2, 8)
    )


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
