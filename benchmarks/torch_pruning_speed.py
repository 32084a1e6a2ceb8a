"""Torch-Pruning's seconds of build and step on one network, for graph_speed.py.

    python benchmarks/torch_pruning_speed.py resnet50

Needs torch and torch-pruning. The networks are written out because torchvision is not
needed for more; weights are random. "build" makes the pruner, "step" removes half the
channels (half the width of every head) at once by L1 norm; medians of three rounds after
one to warm up.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
import torch_pruning as tp
from torch import nn

ROUNDS = 3


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.one = conv(inputs, width, 1)
        self.two = conv(width, width, 3, stride)
        self.three = conv(width, outputs, 1)
        changes = stride != 1 or inputs != outputs
        self.short = conv(inputs, outputs, 1, stride) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.two(self.one(x).relu()).relu()
        return (self.three(y) + self.short(x)).relu()


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        for block in range(count):
            stride = 2 if stage and not block else 1
            layers.append(Bottleneck(inputs, 64 * 2**stage, stride))
            inputs = 256 * 2**stage
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
    return nn.Sequential(*layers, *head)


class DenseLayer(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.bn1, self.one = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 128, 1)
        self.bn2, self.two = nn.BatchNorm2d(128), nn.Conv2d(128, 32, 3, padding=1)

    def forward(self, parts: list[torch.Tensor]) -> torch.Tensor:
        x = torch.cat(parts, 1)  # all before it, as torchvision's does
        return self.two(self.bn2(self.one(self.bn1(x).relu())).relu())


class DenseBlock(nn.Module):
    def __init__(self, inputs: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(inputs + 32 * k) for k in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x]
        for layer in self.layers:
            parts.append(layer(parts))
        return torch.cat(parts, 1)


def densenet121() -> nn.Module:
    layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for block, count in enumerate((6, 12, 24, 16)):
        layers.append(DenseBlock(width, count))
        width += 32 * count
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        if block < 3:
            layers += [nn.Conv2d(width, width // 2, 1), nn.AvgPool2d(2)]
            width //= 2
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000)]
    return nn.Sequential(*layers, *head)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, 16)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


def main() -> None:
    name = sys.argv[1]
    networks = {"resnet50": resnet50, "densenet121": densenet121, "vit_b16": ViT}
    if name not in networks:
        print(f"  Torch-Pruning: {name} is not written out here")
        return
    torch.set_num_threads(1)
    seconds = [measure(networks[name]().eval()) for _ in range(1 + ROUNDS)][1:]
    build, step = (statistics.median(s) for s in zip(*seconds, strict=True))
    print(f"  Torch-Pruning: build {build:.2f}, step {step:.2f}")


def measure(model: nn.Module) -> tuple[float, float]:
    """CPU seconds of building the pruner and of a step."""
    x = torch.zeros(1, 3, 224, 224)
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    heads = {
        m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)
    }
    start = time.process_time()
    pruner = tp.pruner.BasePruner(
        model,
        x,
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[last],
        num_heads=heads,
    )
    built = time.process_time()
    pruner.step()
    return built - start, time.process_time() - built


if __name__ == "__main__":
    main()
