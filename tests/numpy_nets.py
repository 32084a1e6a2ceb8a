"""The reference networks in plain NumPy, as their papers state them."""

import itertools

import numpy as np


def numpy_conv(x, k, stride, pad):
    """Cross-correlation of (B, H, W, I) in float64, `pad` zeros on every side."""
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, k.shape[:2], (1, 2))
    windows = windows[:, ::stride, ::stride]
    return np.einsum("bhwiyx,yxio->bhwo", windows, k, optimize=True)


class NumpyNet:
    """Inference layers in float64 on a Flax tree of variables."""

    def __init__(self, variables):
        self.params, self.stats = variables["params"], variables.get("batch_stats")

    def find(self, tree, path):
        for part in path.split("/"):
            tree = tree[part]
        return {k: np.asarray(v, np.float64) for k, v in tree.items()}

    def conv(self, x, path, stride=1):
        p = self.find(self.params, path)
        pad = (p["kernel"].shape[0] - 1) // 2
        return numpy_conv(x, p["kernel"], stride, pad) + p.get("bias", 0)

    def norm(self, x, path):
        p, s = self.find(self.params, path), self.find(self.stats, path)
        y = (x - s["mean"]) / np.sqrt(s["var"] + 1e-5)
        return y * p["scale"] + p["bias"]

    def dense(self, x, path):
        p = self.find(self.params, path)
        return x @ p["kernel"] + p["bias"]


def numpy_vgg(variables, x, pools):
    net = NumpyNet(variables)
    for i in range(sum(name.startswith("conv") for name in net.params)):
        x = net.conv(x, f"conv{i}")
        x = np.maximum(net.norm(x, f"bn{i}") if f"bn{i}" in net.params else x, 0)
        if i in pools:
            b, h, w, c = x.shape
            x = x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
    x = x.reshape(len(x), -1)
    for i in range(sum(name.startswith("hidden") for name in net.params)):
        x = np.maximum(net.dense(x, f"hidden{i}"), 0)
    return net.dense(x, "linear")


def numpy_resnet(variables, x, stages, *, one_sided=False):
    """ResNet whose stages have that many blocks; CIFAR's if its stem is 3x3."""
    net = NumpyNet(variables)
    large = net.params["conv"]["kernel"].shape[0] == 7
    x = np.maximum(net.norm(net.conv(x, "conv", 2 if large else 1), "bn"), 0)
    if large:
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
        x = windows[:, ::2, ::2].max((-2, -1))
    for i in range(sum(stages)):
        name = f"block{i}"
        stride = 2 if i in itertools.accumulate(stages) else 1
        convs = sum(key.startswith("conv") for key in net.params[name])
        y = x
        for j in range(1, convs + 1):
            kernel = net.find(net.params, f"{name}/conv{j}")["kernel"]
            # The stride is the 3x3 convolution's, the first one's of a basic block.
            here = stride if j == convs - 1 else 1
            if one_sided and here == 2:
                # What padding="SAME" of XLA would do: this must not match.
                y = np.pad(y, ((0, 0), (0, 1), (0, 1), (0, 0)))
                y = numpy_conv(y, kernel, 2, 0)
            else:
                y = net.conv(y, f"{name}/conv{j}", here)
            y = net.norm(y, f"{name}/bn{j}")
            y = np.maximum(y, 0) if j < convs else y
        if "proj" in net.params[name]:
            x = net.norm(net.conv(x, f"{name}/proj", stride), f"{name}/proj_bn")
        elif stride == 2:
            x = x[:, ::2, ::2]
            zeros = np.zeros((*x.shape[:3], y.shape[-1] - x.shape[-1]))
            x = np.concatenate([x, zeros], -1)
        x = np.maximum(x + y, 0)
    return net.dense(x.mean((1, 2)), "linear")
