"""One compiled training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.data.batching import batch_key, prepare
from jaxprune.data.dataset import Transform
from jaxprune.train.apply import predict, predict_training


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
      step: int32 (), steps taken.
      params: what the gradient updates.
      extra: the other collections, such as batch_stats.
      opt_state: the optimiser's.
      average: exponential moving average of (params, extra), None without.
    """

    step: jax.Array
    params: Any
    extra: Any
    opt_state: Any
    average: Any


class Losses(NamedTuple):
    """Options of the training loss.

    Attributes:
      label_smoothing: share of the target spread evenly over all classes.
      distill_weight: share of the teacher's part in the loss.
      temperature: of the distillation.
      ema: decay of the moving average of the weights a step, 0 for none.
    """

    label_smoothing: float
    distill_weight: float
    temperature: float
    ema: float


def initial_state(variables: Any, optimizer: Any, *, ema: float) -> TrainState:
    """The state before the first step."""
    params = variables["params"]
    extra = {name: tree for name, tree in variables.items() if name != "params"}
    average = jax.tree.map(jnp.array, (params, extra)) if ema else None
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, extra, optimizer.init(params), average)


def final_variables(state: TrainState) -> Any:
    """The trained variables: the moving average where there is one."""
    params, extra = state.average or (state.params, state.extra)
    return {"params": params, **extra}


def distillation(
    logits: jax.Array, teacher_logits: jax.Array, *, temperature: float
) -> jax.Array:
    """T^2 * KL(teacher || student) of softmax(logits / T), per example (B,).

    Hinton, Vinyals, Dean 2015, arXiv:1503.02531; T^2 keeps the gradient's scale.
    """
    student = jax.nn.log_softmax(logits / temperature)
    teacher = jax.nn.log_softmax(teacher_logits / temperature)
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return temperature**2 * divergence


def make_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    *,
    transform: Transform,
    losses: Losses,
    teacher_model: Any = None,
) -> Callable[..., tuple[TrainState, jax.Array]]:
    """A function (state, x, y, seed, epoch, index, teacher) -> (state, metrics).

    x is uint8 (B, H, W, C) and y int32 (B,), split over the devices; metrics is
    float32 (2,), loss and accuracy of the batch. The incoming state is consumed.
    """

    def loss_fn(params, extra, x, y, key, teacher):
        logits, updates = predict_training(model, {"params": params, **extra}, x, key)
        target = optax.smooth_labels(
            jax.nn.one_hot(y, logits.shape[-1]), losses.label_smoothing
        )
        loss = optax.softmax_cross_entropy(logits, target).mean()
        if teacher_model is not None:
            soft = distillation(
                logits,
                jax.lax.stop_gradient(predict(teacher_model, teacher, x)),
                temperature=losses.temperature,
            ).mean()
            loss = (1 - losses.distill_weight) * loss + losses.distill_weight * soft
        accuracy = jnp.mean(jnp.argmax(logits, -1) == y)
        return loss, (updates, jnp.stack([loss, accuracy]))

    def step(state, x, y, seed, epoch, index, teacher):
        crop_key, dropout_key = jax.random.split(batch_key(seed, epoch, index))
        x = prepare(x, transform=transform, key=crop_key)
        (_, (extra, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state.extra, x, y, dropout_key, teacher
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            # The decay grows with the steps, so that a short run is not stuck at its
            # starting point.
            decay = jnp.minimum(losses.ema, (1.0 + state.step) / (10.0 + state.step))
            average = optax.incremental_update((params, extra), average, 1 - decay)
        return TrainState(state.step + 1, params, extra, opt_state, average), metrics

    return jax.jit(step, donate_argnums=0)
