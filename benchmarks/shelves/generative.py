"""Generative models of public code bases, written anew in their authors' style."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .case import Case, Shelf, linen, normal

MODELS = Shelf()


# hojonathanho/diffusion and yang-song/score_sde: U-Net with time embedding ------------


def timestep_embedding(timesteps, width: int):
    half = width // 2
    frequencies = jnp.exp(jnp.arange(half) * -(np.log(10_000) / (half - 1)))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class ResnetBlock(nn.Module):
    width: int
    groups: int = 4

    @nn.compact
    def __call__(self, x, temb, train: bool = False):
        h = nn.swish(nn.GroupNorm(self.groups)(x))
        h = nn.Conv(self.width, (3, 3), name="conv1")(h)
        h = h + nn.Dense(self.width, name="temb_proj")(nn.swish(temb))[:, None, None]
        h = nn.swish(nn.GroupNorm(self.groups)(h))
        h = nn.Dropout(0.1, deterministic=not train)(h)
        h = nn.Conv(self.width, (3, 3), name="conv2")(h)
        if x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), name="nin_shortcut")(x)
        return x + h


class AttnBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        b, height, width, c = x.shape
        h = nn.GroupNorm(4, name="norm")(x)
        q, k, v = (nn.Dense(c, name=name)(h) for name in "qkv")
        w = jnp.einsum("bhwc,bHWc->bhwHW", q, k) * (int(c) ** -0.5)
        w = w.reshape(b, height, width, height * width)
        w = nn.softmax(w, -1).reshape(b, height, width, height, width)
        h = jnp.einsum("bhwHW,bHWc->bhwc", w, v)
        return x + nn.Dense(c, name="proj_out")(h)


class DiffusionUNet(nn.Module):
    ch: int = 16
    ch_mult: Sequence[int] = (1, 2)

    @nn.compact
    def __call__(self, x, t, train: bool = False):
        temb = timestep_embedding(t, self.ch)
        temb = nn.Dense(4 * self.ch, name="dense0")(temb)
        temb = nn.Dense(4 * self.ch, name="dense1")(nn.swish(temb))
        hs = [nn.Conv(self.ch, (3, 3), name="conv_in")(x)]
        for level, mult in enumerate(self.ch_mult):
            h = ResnetBlock(self.ch * mult)(hs[-1], temb, train)
            if level:
                h = AttnBlock()(h)
            hs.append(h)
            if level + 1 < len(self.ch_mult):
                down = nn.Conv(h.shape[-1], (3, 3), strides=2, name=f"down{level}")
                hs.append(down(h))
        h = ResnetBlock(hs[-1].shape[-1])(hs[-1], temb, train)
        h = ResnetBlock(h.shape[-1])(AttnBlock()(h), temb, train)
        for level, mult in reversed(list(enumerate(self.ch_mult))):
            for _ in range(2):
                h = jnp.concatenate([h, hs.pop()], axis=-1)
                h = ResnetBlock(self.ch * mult)(h, temb, train)
            if level:
                b, height, width, c = h.shape
                h = jax.image.resize(h, (b, 2 * height, 2 * width, c), "nearest")
                h = nn.Conv(c, (3, 3), name=f"up{level}")(h)
        assert not hs
        h = nn.swish(nn.GroupNorm(4)(h))
        return nn.Conv(3, (3, 3), kernel_init=nn.initializers.zeros, name="out")(h)


@MODELS("diffusion U-Net with time embedding")
def diffusion_unet() -> Case:
    return linen(DiffusionUNet(), normal(2, 8, 8, 3), jnp.array([3, 70]))


# facebookresearch/DiT ------------------------------------------------------------------


class DiTBlock(nn.Module):
    heads: int = 4

    @nn.compact
    def __call__(self, x, c):
        width = x.shape[-1]
        mods = nn.Dense(6 * width, name="adaln")(nn.silu(c))
        a, b, g, d, e, f = jnp.split(mods[:, None], 6, axis=-1)
        norm = nn.LayerNorm(use_scale=False, use_bias=False)
        y = norm(x) * (1 + b) + a
        x = x + g * nn.MultiHeadDotProductAttention(self.heads)(y, y)
        y = nn.LayerNorm(use_scale=False, use_bias=False)(x) * (1 + e) + d
        y = nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(y)))
        return x + f * y


class DiT(nn.Module):
    width: int = 32

    @nn.compact
    def __call__(self, x, t, labels):
        b, h, w, _ = x.shape
        x = nn.Conv(self.width, (2, 2), strides=2, name="patchify")(x)
        x = x.reshape(b, -1, self.width)
        init = nn.initializers.normal(0.02)
        x = x + self.param("pos_embed", init, (1, x.shape[1], self.width))
        c = nn.Dense(self.width)(timestep_embedding(t, 16))
        c = nn.Dense(self.width)(nn.silu(c)) + nn.Embed(10, self.width)(labels)
        for _ in range(2):
            x = DiTBlock()(x, c)
        shift, scale = jnp.split(nn.Dense(2 * self.width)(nn.silu(c))[:, None], 2, -1)
        x = nn.LayerNorm(use_scale=False, use_bias=False)(x) * (1 + scale) + shift
        x = nn.Dense(2 * 2 * 3, name="final")(x)
        x = x.reshape(b, h // 2, w // 2, 2, 2, 3)
        return jnp.einsum("nhwpqc->nhpwqc", x).reshape(b, h, w, 3)


@MODELS("DiT: diffusion transformer, adaLN")
def dit() -> Case:
    times, labels = jnp.array([3, 70]), jnp.array([1, 7])
    return linen(DiT(), normal(2, 8, 8, 3), times, labels)


# DCGAN (arXiv:1511.06434), as ports to Flax write it ---------------------------------


class Generator(nn.Module):
    features: int = 8

    @nn.compact
    def __call__(self, z, train: bool = False):
        x = nn.Dense(4 * 4 * 4 * self.features)(z)
        x = x.reshape(-1, 4, 4, 4 * self.features)
        for factor in (2, 1):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            x = nn.ConvTranspose(
                factor * self.features, (4, 4), strides=(2, 2), use_bias=False
            )(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return jnp.tanh(nn.ConvTranspose(3, (4, 4), strides=(2, 2))(x))


class Discriminator(nn.Module):
    features: int = 8

    @nn.compact
    def __call__(self, x, train: bool = False):
        for k in range(3):
            x = nn.Conv(self.features * 2**k, (4, 4), strides=2, use_bias=not k)(x)
            if k:
                x = nn.BatchNorm(use_running_average=not train)(x)
            x = nn.leaky_relu(x, 0.2)
        return nn.Dense(1)(x.reshape(x.shape[0], -1))


@MODELS("DCGAN generator")
def dcgan_generator() -> Case:
    return linen(Generator(), normal(2, 12))


@MODELS("DCGAN discriminator")
def dcgan_discriminator() -> Case:
    return linen(Discriminator(), normal(2, 16, 16, 3))


# google/flax, examples/vae and examples/pixelcnn --------------------------------------


class VAE(nn.Module):
    latents: int = 8

    @nn.compact
    def __call__(self, x, key):
        h = nn.relu(nn.Dense(40, name="fc1")(x))
        mean = nn.Dense(self.latents, name="fc2_mean")(h)
        logvar = nn.Dense(self.latents, name="fc2_logvar")(h)
        eps = jax.random.normal(key, logvar.shape)
        z = mean + eps * jnp.exp(0.5 * logvar)
        h = nn.relu(nn.Dense(40, name="dec1")(z))
        return nn.Dense(x.shape[-1], name="dec2")(h)


@MODELS("VAE (flax examples/vae)")
def vae() -> Case:
    return linen(VAE(), normal(3, 20), jax.random.key(5))


class ConvWeightNorm(nn.Module):
    features: int
    size: tuple[int, int] = (2, 3)

    @nn.compact
    def __call__(self, x):
        shape = (*self.size, x.shape[-1], self.features)
        direction = self.param("direction", nn.initializers.normal(), shape)
        scale = self.param("scale", nn.initializers.ones, (self.features,))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        norm = jnp.sqrt(jnp.sum(jnp.square(direction), axis=(0, 1, 2)))
        kernel = direction * (scale / norm)
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + bias


def concat_elu(x):
    return nn.elu(jnp.concatenate((x, -x), -1))


class PixelCNN(nn.Module):
    features: int = 8

    @nn.compact
    def __call__(self, x):
        x = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], -1)

        def shifted(x, features):
            x = jnp.pad(x, ((0, 0), (1, 0), (1, 1), (0, 0)))
            return ConvWeightNorm(features)(x)

        x = shifted(x, self.features)
        for _ in range(2):
            y = shifted(concat_elu(x), self.features)
            y = shifted(concat_elu(y), 2 * self.features)
            y, gate = jnp.split(y, 2, axis=-1)
            x = x + y * nn.sigmoid(gate)
        return ConvWeightNorm(10, (1, 1))(nn.elu(x))


@MODELS("gated PixelCNN, weight norm (flax examples/pixelcnn)")
def pixelcnn() -> Case:
    return linen(PixelCNN(), normal(2, 8, 8, 3))


# NeRF (google-research/jaxnerf): a skip by concatenation ------------------------------


class NerfMLP(nn.Module):
    depth: int = 6
    width: int = 32
    skip_layer: int = 4

    @nn.compact
    def __call__(self, x, condition):
        samples = x.shape[1]
        x = x.reshape([-1, x.shape[-1]])
        inputs = x
        for i in range(self.depth):
            x = nn.relu(nn.Dense(self.width)(x))
            if i % self.skip_layer == 0 and i > 0:
                x = jnp.concatenate([x, inputs], axis=-1)
        sigma = nn.Dense(1)(x).reshape([-1, samples, 1])
        bottleneck = nn.Dense(self.width)(x)
        condition = jnp.tile(condition[:, None], (1, samples, 1))
        condition = condition.reshape([-1, condition.shape[-1]])
        x = jnp.concatenate([bottleneck, condition], axis=-1)
        x = nn.relu(nn.Dense(self.width // 2)(x))
        return nn.Dense(3)(x).reshape([-1, samples, 3]), sigma


@MODELS("NeRF (jaxnerf)")
def nerf() -> Case:
    return linen(NerfMLP(), normal(2, 5, 12), normal(2, 6))


# ESRGAN's residual-in-residual dense blocks and pixel shuffle (arXiv:1809.00219) -----


class DenseResidual(nn.Module):
    features: int = 12
    growth: int = 6

    @nn.compact
    def __call__(self, x):
        parts = [x]
        for _ in range(3):
            y = nn.Conv(self.growth, (3, 3))(jnp.concatenate(parts, -1))
            parts.append(nn.leaky_relu(y, 0.2))
        y = nn.Conv(self.features, (3, 3))(jnp.concatenate(parts, -1))
        return x + 0.2 * y


class SuperResolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = first = nn.Conv(12, (3, 3))(x)
        for _ in range(2):
            x = x + 0.2 * DenseResidual()(DenseResidual()(x))
        x = first + nn.Conv(12, (3, 3))(x)
        x = nn.Conv(4 * 12, (3, 3))(x)
        b, h, w, c = x.shape
        x = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(b, 2 * h, 2 * w, c // 4)
        return nn.Conv(3, (3, 3))(nn.leaky_relu(x, 0.2))


@MODELS("ESRGAN generator, pixel shuffle")
def super_resolution() -> Case:
    return linen(SuperResolution(), normal(2, 8, 8, 3))
