"""NNX objects of jax-image-models at small sizes; they want a mesh, here of one device."""

from __future__ import annotations

import jax
from jimm.models.clip import CLIP
from jimm.models.dinov2 import DINOv2Model
from jimm.models.dinov3 import DINOv3Model
from jimm.models.siglip import SigLIP
from jimm.models.vit import VisionTransformer

from .case import Case, Shelf, normal, tokens
from .nnx_case import case

MODELS = Shelf()
jax.set_mesh(jax.make_mesh((1,), ("fsdp",)))
_IMAGE = {"img_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 4}
_VIT = {**_IMAGE, "hidden_size": 32, "mlp_dim": 48}


@MODELS("ViT (jax-image-models)")
def vit() -> Case:
    return case(
        lambda rngs: VisionTransformer(num_classes=5, **_VIT, rngs=rngs),
        normal(2, 16, 16, 3),
        abstract=False,
    )


@MODELS("DINOv2 (jax-image-models)")
def dinov2() -> Case:
    return case(
        lambda rngs: DINOv2Model(**_VIT, rngs=rngs),
        normal(2, 16, 16, 3),
        abstract=False,
    )


@MODELS("DINOv3, RoPE (jax-image-models)")
def dinov3() -> Case:
    return case(
        lambda rngs: DINOv3Model(**_VIT, rngs=rngs),
        normal(2, 16, 16, 3),
        abstract=False,
    )


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
        lambda rngs: CLIP(**_TOWERS, rngs=rngs),
        normal(2, 16, 16, 3),
        tokens(2, 8),
        abstract=False,
    )


@MODELS("SigLIP (jax-image-models)")
def siglip() -> Case:
    towers = {**_TOWERS, "text_hidden_size": 64}
    return case(
        lambda rngs: SigLIP(**towers, rngs=rngs),
        normal(2, 16, 16, 3),
        tokens(2, 8),
        abstract=False,
    )
