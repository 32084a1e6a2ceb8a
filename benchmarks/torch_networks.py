"""The CIFAR VGG and ResNet of jaxprune.models in PyTorch, and weights both ways.

Modules carry the names of the Flax layers, so that "params/block0/conv1/kernel" is
"block0.conv1.weight". Needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from jaxprune import trees
from jaxprune.models.resnet import ResNet as FlaxResNet
from jaxprune.models.vgg import VGG as FlaxVGG

# Last part of a leaf's name -> attribute of the PyTorch module.
_ATTRIBUTES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


class VGG(nn.Module):
    """3x3 convolutions with BatchNorm, 2x2 max pools, one linear layer."""

    def __init__(self, model: FlaxVGG) -> None:
        super().__init__()
        self.pool_after, inputs = model.pool_after, 3
        self.count = len(model.conv_widths)
        for i, width in enumerate(model.conv_widths):
            self.add_module(f"conv{i}", _conv(inputs, width, 3, 1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(width, eps=model.bn_epsilon))
            inputs = width
        self.linear = nn.Linear(inputs, model.num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(self.count):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            x = functional.relu(norm(conv(x)))
            if i in self.pool_after:
                x = functional.max_pool2d(x, 2)
        return self.linear(x.flatten(1))


class Block(nn.Module):
    """A basic block, with a strided 1x1 projection where a stage begins."""

    def __init__(
        self, inputs: int, inner: int, outputs: int, stride: int, project: bool
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, inner, 3, stride), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _conv(inner, outputs, 3, 1), nn.BatchNorm2d(outputs)
        self.proj: nn.Module | None = None
        if project:
            self.proj = _conv(inputs, outputs, 1, stride)
            self.proj_bn = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.proj is not None:
            x = self.proj_bn(self.proj(x))
        return functional.relu(x + y)


class ResNet(nn.Module):
    """Stem, three stages of basic blocks, global average pool, linear layer."""

    def __init__(self, model: FlaxResNet) -> None:
        super().__init__()
        assert model.stem == "cifar" and model.shortcut == "projection"
        inputs, number = model.stem_width, 0
        self.conv, self.bn = _conv(3, inputs, 3, 1), nn.BatchNorm2d(inputs)
        for stage, count in enumerate(model.stage_blocks):
            for block in range(count):
                outputs = model.stage_widths[stage]
                starts = stage > 0 and block == 0
                inner = model.inner_widths[number][0]
                made = Block(inputs, inner, outputs, 2 if starts else 1, starts)
                self.add_module(f"block{number}", made)
                inputs, number = outputs, number + 1
        self.count = number
        self.linear = nn.Linear(inputs, model.num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn(self.conv(x)))
        for i in range(self.count):
            x = getattr(self, f"block{i}")(x)
        return self.linear(x.mean((2, 3)))


def _conv(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


def to_torch(model: Any, variables: Any) -> nn.Module:
    """The PyTorch network of a Flax VGG or ResNet, in eval mode, with its weights."""
    network = VGG(model) if isinstance(model, FlaxVGG) else ResNet(model)
    state = network.state_dict()
    for path, leaf in trees.flatten(variables).items():
        name, array = _torch_name(path), np.asarray(leaf)
        order = (3, 2, 0, 1) if array.ndim == 4 else tuple(reversed(range(array.ndim)))
        state[name] = torch.tensor(array.transpose(order).copy())
    network.load_state_dict(state)
    return network.eval()


def to_flax(model: Any, variables: Any, network: nn.Module) -> tuple[Any, Any]:
    """(Flax model, variables) of a PyTorch network, of whatever widths it has now.

    Args:
      model, variables: the unpruned Flax network, for structure and names.
      network: from `to_torch(model, ...)`, pruned or not.
    """
    state = network.state_dict()
    leaves = {}
    for path, leaf in trees.flatten(variables).items():
        array = state[_torch_name(path)].numpy()
        order = (2, 3, 1, 0) if array.ndim == 4 else tuple(reversed(range(array.ndim)))
        leaves[path] = jnp.asarray(array.transpose(order), leaf.dtype)
    small = trees.unflatten_like(variables, leaves)
    return model.resized(small), small


def _torch_name(path: str) -> str:
    _, *modules, last = path.split("/")
    return ".".join([*modules, _ATTRIBUTES[last]])


def images(x: Any) -> torch.Tensor:
    """NCHW float32 of images (B, H, W, C)."""
    return torch.tensor(np.asarray(x, np.float32).transpose(0, 3, 1, 2).copy())


@torch.no_grad()
def largest_difference(
    network: nn.Module, model: Any, variables: Mapping[str, Any], x: Any
) -> float:
    """max |logits in PyTorch - logits in Flax| on images (B, H, W, C)."""
    expected = np.asarray(model.apply(variables, x, train=False))
    return float(np.abs(network(images(x)).numpy() - expected).max())
