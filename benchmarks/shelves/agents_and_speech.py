"""Agents and speech models of public code bases, written anew in their style."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from .case import Case, Shelf, linen, normal, tokens

MODELS = Shelf()


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
