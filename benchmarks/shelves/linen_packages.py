"""Linen modules of packages: flaim, flaxmodels and Brax, at small sizes.

Not here, because they call what this JAX has dropped: flaim's XCiT, StyleGAN2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flaxmodels
import jax
from brax.training import networks

# flaim 0.0.5 annotates with a name that JAX has dropped since.
jax.random.KeyArray = jax.Array

from flaim import models as flaim
from flaim.models.factory import CONFIGS

from .case import Case, Shelf, linen, normal

MODELS = Shelf()
IMAGE = (2, 32, 32, 3)

# flaim: (class, options that make it small)
FLAIM: dict[str, tuple[Any, dict[str, Any]]] = {
    "CaiT": (flaim.cait.Cait, {"depth": 2, "token_dim": 32, "n_heads": 4}),
    "ConvMixer": (flaim.convmixer.ConvMixer, {"depth": 2, "dim": 24}),
    "ConvNeXt V2": (
        flaim.convnext.ConvNeXt,
        {"depths": (1, 2), "out_dims": (16, 24), "grn": True},
    ),
    "GCViT": (
        flaim.gcvit.GCViT,
        {
            "depths": (2, 2),
            "token_dim": 16,
            "n_heads": (2, 4),
            "window_size_factors": (8, 8),
        },
    ),
    "HorNet": (
        flaim.hornet.HorNet,
        {"depths": (1, 1), "out_dim_first_stage": 16, "orders": (2, 3)},
    ),
    "MaxViT": (
        flaim.maxvit.MaxViT,
        {
            "depths": (1, 1),
            "out_dims": (16, 32),
            "stem_out_dim": 16,
            "head_dim": 8,
            "partition_size_factor": 8,
        },
    ),
    "NesT": (
        flaim.nest.NesT,
        {"depths": (1, 1), "token_dims": (16, 32), "n_heads": (2, 4)},
    ),
    "PVT v2": (
        flaim.pvtv2.PVTV2,
        {
            "depths": (1, 1),
            "token_dims": (16, 32),
            "n_heads": (1, 2),
            "sr_factors": (2, 1),
            "mlp_hidden_dim_expansion_factors": (4.0, 4.0),
        },
    ),
    "RegNet": (
        flaim.regnet.RegNet,
        {"depths": (1, 2), "out_dims": (16, 32), "dim_per_cardinal": 8},
    ),
    "ResNeXt": (
        flaim.resnet.ResNet,
        {"depths": (1, 1), "cardinality": 4, "dim_per_cardinal_first_stage": 4},
    ),
    "Swin": (
        flaim.swin.Swin,
        {"depths": (2, 2), "token_dim": 16, "n_heads": (2, 4), "window_size": 4},
    ),
    "VAN": (
        flaim.van.VAN,
        {
            "depths": (1, 1),
            "out_dims": (16, 24),
            "mlp_hidden_dim_expansion_factors": (4.0, 4.0),
        },
    ),
    "ViT, relative positions": (
        flaim.vit.ViT,
        {
            "depth": 2,
            "token_dim": 32,
            "n_heads": 4,
            "patch_size": 8,
            "rel_pos_embed": True,
        },
    ),
}


def _flaim(kind: Any, options: dict[str, Any]) -> Callable[[], Case]:
    return lambda: linen(kind(**options, n_classes=5), normal(*IMAGE))


for _name, (_kind, _options) in FLAIM.items():
    MODELS(f"{_name} (flaim)")(_flaim(_kind, _options))


@MODELS("EfficientNet V2 (flaim)")
def efficientnet_v2() -> Case:
    options = dict(CONFIGS["efficientnetv2_small"])
    kind = options.pop("model_cls")
    options = {k: v for k, v in options.items() if k in kind.__dataclass_fields__}
    options |= {"depths": (1,) * len(options["depths"]), "n_classes": 5}
    return linen(kind(**options), normal(*IMAGE))


def _unit(*shape: int) -> Any:
    return jax.random.uniform(jax.random.key(3), shape)


@MODELS("ResNet-18 (flaxmodels)")
def resnet18() -> Case:
    model = flaxmodels.ResNet18(output="logits", pretrained=None, num_classes=5)
    return linen(model, _unit(*IMAGE), train=False)


@MODELS("VGG-16 (flaxmodels)")
def vgg16() -> Case:
    model = flaxmodels.VGG16(output="activations", pretrained=None, include_head=False)
    return linen(
        model, _unit(*IMAGE), train=False, outputs=lambda found: found["relu5_3"]
    )


@MODELS("MLP with layer norm (Brax)")
def brax_mlp() -> Case:
    return linen(networks.MLP((32, 24, 6), layer_norm=True), normal(3, 10))


@MODELS("MLP with spectral norm (Brax)")
def brax_spectral() -> Case:
    def apply(module: Any, variables: Any, x: Any) -> Any:
        names = ["sing_vec"]  # its power iteration goes on at every call
        keys = {"sing_vec": jax.random.key(0)}
        return module.apply(variables, x, rngs=keys, mutable=names)[0]

    return linen(networks.SNMLP((32, 24, 6)), normal(3, 10), apply=apply)


@MODELS("pixels to actions (Brax)")
def brax_vision() -> Case:
    model = networks.VisionMLP((24, 6), layer_norm=True, activation=nn.swish)
    return linen(model, {"pixels/view_0": normal(2, 36, 36, 3)})
