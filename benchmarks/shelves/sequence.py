"""Sequence models and agents of public code bases, written anew in their style."""

from __future__ import annotations

from collections.abc import Sequence
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


# luchris429/purejaxrl: recurrent actor-critic -----------------------------------------


class ScannedRNN(nn.Module):
    @partial(
        nn.scan,
        variable_broadcast="params",
        in_axes=0,
        out_axes=0,
        split_rngs={"params": False},
    )
    @nn.compact
    def __call__(self, carry, x):
        ins, resets = x
        start = self.initialize_carry(ins.shape[0], carry.shape[-1])
        state = jnp.where(resets[:, None], start, carry)
        return nn.GRUCell(features=carry.shape[-1])(state, ins)

    @staticmethod
    def initialize_carry(batch_size, hidden_size):
        cell = nn.GRUCell(features=hidden_size)
        return cell.initialize_carry(jax.random.key(0), (batch_size, hidden_size))


class ActorCriticRNN(nn.Module):
    actions: int = 4

    @nn.compact
    def __call__(self, hidden, x):
        obs, dones = x
        embedding = nn.relu(nn.Dense(16)(obs))
        hidden, embedding = ScannedRNN()(hidden, (embedding, dones))
        actor = nn.Dense(self.actions)(nn.relu(nn.Dense(20)(embedding)))
        critic = nn.Dense(1)(nn.relu(nn.Dense(18)(embedding)))
        return hidden, actor, jnp.squeeze(critic, axis=-1)


@MODELS("recurrent actor-critic (purejaxrl)")
def actor_critic_rnn() -> Case:
    dones = jnp.zeros((5, 2), bool).at[2, 1].set(True)
    return linen(ActorCriticRNN(), normal(2, 16), (normal(5, 2, 6), dones))


class ActorCritic(nn.Module):
    actions: int = 4

    @nn.compact
    def __call__(self, x):
        init, bias = nn.initializers.orthogonal(2**0.5), nn.initializers.constant(0.0)
        dense = partial(nn.Dense, kernel_init=init, bias_init=bias)
        actor = nn.tanh(dense(32)(nn.tanh(dense(32)(x))))
        logstd = self.param("log_std", nn.initializers.zeros, (self.actions,))
        critic = nn.tanh(dense(32)(nn.tanh(dense(32)(x))))
        value = jnp.squeeze(dense(1)(critic), axis=-1)
        return dense(self.actions)(actor), jnp.exp(logstd), value


@MODELS("PPO actor-critic, continuous (purejaxrl)")
def actor_critic() -> Case:
    return linen(ActorCritic(), normal(3, 6))


class AtariActorCritic(nn.Module):
    outputs: int = 6

    @nn.compact
    def __call__(self, x):
        x = x.astype(jnp.float32) / 255.0
        x = nn.relu(nn.Conv(32, (8, 8), strides=(4, 4), name="conv1")(x))
        x = nn.relu(nn.Conv(64, (4, 4), strides=(2, 2), name="conv2")(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=(1, 1), name="conv3")(x))
        x = nn.relu(nn.Dense(64, name="hidden")(x.reshape((x.shape[0], -1))))
        logits = nn.Dense(self.outputs, name="logits")(x)
        return nn.log_softmax(logits), nn.Dense(1, name="value")(x)


@MODELS("PPO actor-critic, Atari (flax examples/ppo)")
def atari() -> Case:
    return linen(AtariActorCritic(), 255 * jnp.abs(normal(2, 36, 36, 4)))


# ikostrikov/jaxrl: SAC with two critics under vmap ------------------------------------


class Critic(nn.Module):
    widths: Sequence[int] = (24, 24)

    @nn.compact
    def __call__(self, observations, actions):
        x = jnp.concatenate([observations, actions], axis=-1)
        for width in self.widths:
            x = nn.relu(nn.LayerNorm()(nn.Dense(width)(x)))
        return jnp.squeeze(nn.Dense(1)(x), -1)


class DoubleCritic(nn.Module):
    num_qs: int = 2

    @nn.compact
    def __call__(self, observations, actions):
        vmapped = nn.vmap(
            Critic,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=0,
            axis_size=self.num_qs,
        )
        return vmapped()(observations, actions)


@MODELS("SAC double critic under vmap (jaxrl)")
def sac_critic() -> Case:
    return linen(DoubleCritic(), normal(3, 6), normal(3, 2))


# Speech: WaveNet (arXiv:1609.03499) and Conformer (arXiv:2005.08100) ------------------


class WaveNet(nn.Module):
    residual: int = 16
    gate: int = 24
    skip: int = 20
    dilations: Sequence[int] = (1, 2, 4, 8)
    classes: int = 32

    @nn.compact
    def __call__(self, x, features):
        x = nn.Conv(self.residual, (1,), name="input")(jax.nn.one_hot(x, self.classes))
        total = 0.0
        for k, dilation in enumerate(self.dilations):
            y = jnp.pad(x, ((0, 0), (dilation, 0), (0, 0)))
            y = nn.Conv(
                2 * self.gate,
                (2,),
                kernel_dilation=dilation,
                padding="VALID",
                name=f"dilated{k}",
            )(y)
            y = y + nn.Conv(2 * self.gate, (1,), name=f"condition{k}")(features)
            filtered, gated = jnp.split(y, 2, axis=-1)
            y = jnp.tanh(filtered) * nn.sigmoid(gated)
            total = total + nn.Conv(self.skip, (1,), name=f"skip{k}")(y)
            x = x + nn.Conv(self.residual, (1,), name=f"residual{k}")(y)
        x = nn.relu(nn.Conv(self.skip, (1,), name="end1")(nn.relu(total)))
        return nn.Conv(self.classes, (1,), name="end2")(x)


@MODELS("WaveNet, conditioned")
def wavenet() -> Case:
    return linen(WaveNet(), tokens(2, 20), normal(2, 20, 5))


class ConformerBlock(nn.Module):
    width: int
    heads: int = 4

    @nn.compact
    def __call__(self, x, train: bool = False):
        def feed_forward(x):
            y = nn.swish(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            return nn.Dense(self.width)(nn.Dropout(0.1, deterministic=not train)(y))

        x = x + 0.5 * feed_forward(x)
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y)
        y = nn.glu(nn.Dense(2 * self.width)(nn.LayerNorm()(x)))
        y = nn.Conv(self.width, (5,), feature_group_count=self.width)(y)
        y = nn.swish(nn.BatchNorm(use_running_average=not train)(y))
        x = x + nn.Dense(self.width)(y)
        x = x + 0.5 * feed_forward(x)
        return nn.LayerNorm()(x)


class Conformer(nn.Module):
    width: int = 24

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = x[..., None]
        for _ in range(2):
            x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
        x = nn.Dense(self.width)(x.reshape(*x.shape[:2], -1))
        for _ in range(2):
            x = ConformerBlock(self.width)(x, train)
        return nn.log_softmax(nn.Dense(16)(x))


@MODELS("Conformer")
def conformer() -> Case:
    return linen(Conformer(), normal(2, 24, 16))


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
