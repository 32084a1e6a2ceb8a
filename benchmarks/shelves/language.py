"""Language models of public code bases, written anew in their style."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from .case import Case, Shelf, linen, normal, tokens

MODELS = Shelf()


# google-deepmind/nanodo: decoder-only transformer -------------------------------------


class NanodoMlp(nn.Module):
    F: int

    @nn.compact
    def __call__(self, x_BxLxD):
        dense = partial(nn.Dense, use_bias=False)
        x_BxLxF = jax.nn.gelu(dense(self.F)(x_BxLxD))
        return dense(x_BxLxD.shape[-1])(x_BxLxF)


class CausalAttn(nn.Module):
    D: int
    H: int

    @nn.compact
    def __call__(self, x_BxLxD):
        Dh = self.D // self.H
        multilinear = partial(
            nn.DenseGeneral, axis=-1, features=(self.H, Dh), use_bias=False
        )
        q_BxLxHxDh, k_BxLxHxDh, v_BxLxHxDh = (
            multilinear(name="query")(x_BxLxD),
            multilinear(name="key")(x_BxLxD),
            multilinear(name="value")(x_BxLxD),
        )
        q_BxLxHxDh /= Dh**0.5
        att_BxHxLxL = jnp.einsum("...qhd,...khd->...hqk", q_BxLxHxDh, k_BxLxHxDh)
        L = x_BxLxD.shape[1]
        mask_1x1xLxL = jnp.tril(jnp.ones((1, 1, L, L), dtype=jnp.bool_))
        att_BxHxLxL = jnp.where(mask_1x1xLxL, att_BxHxLxL, jnp.finfo(jnp.float32).min)
        att_BxHxLxL = jax.nn.softmax(att_BxHxLxL, axis=-1)
        out_BxLxHxDh = jnp.einsum("...hqk,...khd->...qhd", att_BxHxLxL, v_BxLxHxDh)
        return nn.DenseGeneral(
            features=self.D, name="attn_out_proj", axis=(-2, -1), use_bias=False
        )(out_BxLxHxDh)


class NanodoBlock(nn.Module):
    D: int
    H: int
    F: int

    @nn.compact
    def __call__(self, in_BxLxD):
        x_BxLxD = nn.LayerNorm(use_bias=False)(in_BxLxD)
        x_BxLxD = in_BxLxD + CausalAttn(self.D, self.H)(x_BxLxD)
        z_BxLxD = nn.LayerNorm(use_bias=False)(x_BxLxD)
        return x_BxLxD + NanodoMlp(self.F)(z_BxLxD)


class TransformerDo(nn.Module):
    V: int = 32
    D: int = 32
    H: int = 4
    F: int = 64
    N: int = 2
    L: int = 12

    def setup(self):
        self.embed = nn.Embed(self.V, self.D)
        self.pos_embed = nn.Embed(self.L, self.D)
        block = nn.remat(NanodoBlock)
        self.blocks = [block(self.D, self.H, self.F) for _ in range(self.N)]
        self.out_ln = nn.LayerNorm(use_bias=False)

    def __call__(self, y_BxL):
        y_BxLxD = self.embed(y_BxL)
        y_BxLxD += self.pos_embed(jnp.arange(0, y_BxL.shape[1])[None, ...])
        for block in self.blocks:
            y_BxLxD = block(y_BxLxD)
        return self.embed.attend(self.out_ln(y_BxLxD).astype(jnp.float32))


@MODELS("decoder-only transformer (nanodo)")
def nanodo() -> Case:
    return linen(TransformerDo(), tokens(2, 12))


# AI-Hypercomputer/maxtext: scanned Llama with RoPE and grouped queries ----------------


def rotary(x, positions, min_timescale=1.0, max_timescale=10_000.0):
    half = x.shape[-1] // 2
    fraction = 2 * jnp.arange(0, half) / x.shape[-1]
    timescale = min_timescale * (max_timescale / min_timescale) ** fraction
    angle = positions[:, :, None, None] / timescale
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )


class LlamaLayer(nn.Module):
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    mlp_dim: int = 48

    @nn.compact
    def __call__(self, x, positions):
        width = x.shape[-1]
        y = nn.RMSNorm(name="pre_self_attention_norm")(x)
        project = partial(nn.DenseGeneral, use_bias=False)
        q = project((self.heads, self.head_dim), name="query")(y)
        k = project((self.kv_heads, self.head_dim), name="key")(y)
        v = project((self.kv_heads, self.head_dim), name="value")(y)
        q, k = rotary(q, positions), rotary(k, positions)
        b, t, n, d = q.shape
        q = q.reshape(b, t, k.shape[2], n // k.shape[2], d) / jnp.sqrt(d)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k)
        causal = positions[:, None, None, :, None] >= positions[:, None, None, None]
        scores = jnp.where(causal, scores, -1e9)
        out = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores), v)
        out = out.reshape(b, t, n, v.shape[-1])
        x = x + project(width, axis=(-2, -1), name="out")(out)
        y = nn.RMSNorm(name="post_self_attention_norm")(x)
        gate = nn.silu(nn.Dense(self.mlp_dim, use_bias=False, name="wi_0")(y))
        y = gate * nn.Dense(self.mlp_dim, use_bias=False, name="wi_1")(y)
        return x + nn.Dense(width, use_bias=False, name="wo")(y), None


class ScannedLlama(nn.Module):
    vocabulary: int = 32
    width: int = 32
    depth: int = 3

    @nn.compact
    def __call__(self, inputs, positions):
        embed = nn.Embed(self.vocabulary, self.width, name="token_embedder")
        layer = nn.remat(LlamaLayer, prevent_cse=False)
        x, _ = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )(name="layers")(embed(inputs), positions)
        return nn.Dense(self.vocabulary, name="logits_dense")(nn.RMSNorm()(x))


@MODELS("scanned Llama: RoPE, grouped queries (maxtext)")
def llama() -> Case:
    positions = jnp.tile(jnp.arange(10), (2, 1))
    return linen(ScannedLlama(), tokens(2, 10), positions)


# google/flax, examples/seq2seq: LSTM encoder and decoder ------------------------------


class Decoder(nn.RNNCellBase):
    vocabulary: int
    features: int

    @nn.compact
    def __call__(self, carry, x):
        state, y = nn.LSTMCell(self.features)(carry, x)
        return state, nn.Dense(self.vocabulary)(y)

    @property
    def num_feature_axes(self) -> int:
        return 1

    def initialize_carry(self, rng, input_shape):
        return nn.LSTMCell(self.features, parent=None).initialize_carry(
            rng, input_shape
        )


class Seq2seq(nn.Module):
    hidden: int = 24
    vocabulary: int = 12

    @nn.compact
    def __call__(self, encoder_inputs, decoder_inputs):
        encoder = nn.RNN(nn.LSTMCell(self.hidden), return_carry=True, name="encoder")
        decoder = nn.RNN(Decoder(self.vocabulary, self.hidden), name="decoder")
        carry, _ = encoder(encoder_inputs)
        return decoder(decoder_inputs[:, :-1], initial_carry=carry)


@MODELS("LSTM encoder-decoder (flax examples/seq2seq)")
def seq2seq() -> Case:
    return linen(Seq2seq(), normal(2, 7, 12), normal(2, 5, 12))


class BiClassifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(32, 16)(x)
        forward, backward = nn.RNN(nn.GRUCell(14)), nn.RNN(nn.GRUCell(14))
        x = nn.Bidirectional(forward, backward)(x)
        keys = jnp.tanh(nn.Dense(10, use_bias=False, name="keys")(x))
        energy = nn.Dense(1, use_bias=False, name="energy")(keys)
        weights = jax.nn.softmax(energy, axis=1)
        return nn.Dense(3)(nn.tanh(nn.Dense(12)((weights * x).sum(1))))


@MODELS("bidirectional classifier, attention pooling (flax examples/sst2)")
def sst2() -> Case:
    return linen(BiClassifier(), tokens(2, 9))


# Mixture of experts (google/flaxformer, google-research/vmoe) ------------------------


class MoeBlock(nn.Module):
    experts: int = 4
    width: int = 32
    chosen: int = 2

    @nn.compact
    def __call__(self, x):
        gates = jax.nn.softmax(nn.Dense(self.experts, use_bias=False, name="router")(x))
        top, index = jax.lax.top_k(gates, self.chosen)
        weights = jnp.sum(jax.nn.one_hot(index, self.experts) * top[..., None], axis=-2)
        init = nn.initializers.lecun_normal(batch_axis=0)
        wi = self.param("wi", init, (self.experts, x.shape[-1], self.width))
        wo = self.param("wo", init, (self.experts, self.width, x.shape[-1]))
        y = nn.gelu(jnp.einsum("bld,edf->blef", x, wi))
        return jnp.einsum("blef,efd,ble->bld", y, wo, weights)


class MoeLm(nn.Module):
    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(32, 24)
        x = embed(x)
        for _ in range(2):
            y = nn.RMSNorm()(x)
            mask = nn.make_causal_mask(jnp.ones(y.shape[:2]))
            x = x + nn.MultiHeadDotProductAttention(4)(y, mask=mask)
            x = x + MoeBlock()(nn.RMSNorm()(x))
        return embed.attend(nn.RMSNorm()(x))


@MODELS("mixture-of-experts language model")
def moe() -> Case:
    return linen(MoeLm(), tokens(2, 8))
