"""Reference architectures in Flax Linen, every width an explicit field."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any

import flax.linen as nn

from jaxprune.errors import ConfigError
from jaxprune.models.mlp import MLP, mlp
from jaxprune.models.resnet import ResNet, resnet_cifar, resnet_imagenet
from jaxprune.models.vgg import VGG, vgg_cifar, vgg_imagenet, vgg_small
from jaxprune.models.vit import ViT, vit

__all__ = ["MLP", "VGG", "ResNet", "ViT", "create", "names"]

_Entry = tuple[Callable[..., nn.Module], dict[str, Any]]


def _registry() -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {
        "mlp": (mlp, {}),
        "vgg_small": (vgg_small, {}),
        # Biased convolutions, no BatchNorm, two hidden Dense layers of 4096.
        "vgg16_seed": (
            vgg_cifar,
            {"batch_norm": False, "hidden_widths": (4096, 4096), "dropout": 0.5},
        ),
        "resnet18": (resnet_imagenet, {"stage_blocks": (2, 2, 2, 2)}),
        "resnet34": (resnet_imagenet, {"stage_blocks": (3, 4, 6, 3)}),
        "resnet50": (
            resnet_imagenet,
            {"stage_blocks": (3, 4, 6, 3), "bottleneck": True},
        ),
        "vit_cifar": (
            vit,
            {
                "embed_width": 128,
                "depth": 4,
                "heads": 4,
                "patch": 4,
                "num_classes": 10,
            },
        ),
        "vit_tiny": (vit, {"embed_width": 192, "heads": 3}),
        "vit_small": (vit, {"embed_width": 384, "heads": 6}),
        "vit_b16": (vit, {"embed_width": 768, "heads": 12}),
    }
    for depth in (11, 13, 16, 19):
        for suffix, batch_norm in (("", False), ("_bn", True)):
            preset = {"depth": depth, "batch_norm": batch_norm}
            entries[f"vgg{depth}{suffix}"] = (vgg_imagenet, preset)
            entries[f"cifar_vgg{depth}{suffix}"] = (vgg_cifar, preset)
    for depth in (20, 32, 56, 110):
        entries[f"resnet{depth}"] = (resnet_cifar, {"depth": depth})
    return entries


_REGISTRY = MappingProxyType(_registry())


def names() -> tuple[str, ...]:
    """The names that `create` knows, sorted."""
    return tuple(sorted(_REGISTRY))


def create(name: str, *, num_classes: int | None = None, **overrides: Any) -> nn.Module:
    """The architecture of that name, a Linen module that is not yet initialised.

    `vgg*` and `resnet18`, 34, 50 are the ImageNet forms, `cifar_vgg*` and
    `resnet20`, 32, 56, 110 those for 32x32 images.

    Args:
      num_classes: width of the head; None for that of the published network.
      **overrides: options of the architecture (`width=0.5` halves all widths,
        `shortcut="pad"`, ..) or fields of the module (`dtype=jnp.bfloat16`, ..).

    Raises:
      ConfigError: an unknown name or option; the text names the closest.
    """
    if name not in _REGISTRY:
        raise ConfigError(_unknown("model", name, names()))
    factory, preset = _REGISTRY[name]
    options = set(inspect.signature(factory).parameters)
    arguments = {**preset, **overrides}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    model = factory(**{k: v for k, v in arguments.items() if k in options})
    fields = {field.name for field in dataclasses.fields(model)} - {"parent", "name"}
    rest = {k: v for k, v in arguments.items() if k not in options}
    for option in rest:
        if option not in fields:
            raise ConfigError(_unknown(f"{name} option", option, options | fields))
    return model.clone(**rest)


def _unknown(what: str, found: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(found, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {what} {found!r}; {hint}known: {', '.join(known)}"
