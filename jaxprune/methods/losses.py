"""The check of a loss on a model's outputs and labels, before anything is measured."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.errors import ScoreError, first_line
from jaxprune.graph import ChannelGraph
from jaxprune.methods.batches import shown
from jaxprune.methods.measure import Calibration, LossFn, cross_entropy

OWN = "pass loss_fn=, a function (outputs, y) -> losses (B,), for any other loss"


def check_loss(
    graph: ChannelGraph,
    variables: Any,
    data: Calibration,
    loss_fn: LossFn,
    *,
    user: str,
    without: str = "",
) -> None:
    """Nothing, if `loss_fn` gives one loss per example; costs no FLOPs.

    Args:
      user: what needs the loss, for the message.
      without: what does not.

    Raises:
      ScoreError: no labels, labels that are no classes of the model's logits where the
        loss is `cross_entropy`, or a loss of another shape.
    """
    if data.labels is None:
        raise ScoreError(f"{user} needs labels: pass batches of (x, y){without}")
    check_callable(loss_fn)
    outputs = jax.eval_shape(lambda v, i: graph.handle(v, *i), variables, data.inputs)
    if loss_fn is cross_entropy:
        _check_classes(outputs, data)
    given = f"on outputs {shown(outputs)} and y {shown(data.labels)}"
    expected = (
        "loss_fn must return one loss per example, a floating-point array of shape "
        f"({data.size},)"
    )
    try:
        found = jax.eval_shape(loss_fn, outputs, data.labels)
    except Exception as error:
        raise ScoreError(
            f"{expected}; {given} it raised {type(error).__name__}: {first_line(error)}"
        ) from error
    single = isinstance(found, jax.ShapeDtypeStruct)
    if not single or found.shape != (data.size,) or not _floating(found):
        raise ScoreError(
            f"{expected}; found {shown(found)} {given}: leave out its mean or sum "
            "over examples, and reduce all other axes"
        )


def check_callable(loss_fn: Any) -> None:
    """Nothing, if it can be called.

    Raises:
      ScoreError: it cannot.
    """
    if not callable(loss_fn):
        raise ScoreError(
            "loss_fn must be a function (outputs, y) -> losses (B,), or None for "
            f"cross-entropy; found {loss_fn!r}"
        )


def are_logits(output: Any, data: Calibration, loss_fn: LossFn) -> bool:
    """Whether an output (B, K) holds the logits of K classes: the labels are one class
    an example, or there are none and the loss is the default."""
    if output.ndim != 2 or output.shape[1] < 2 or not _floating(output):
        return False
    if data.labels is None:
        return loss_fn is cross_entropy
    if data.label_range is None or len(data.labels.shape) != 1:
        return False
    low, high = data.label_range
    return low >= 0 and high < output.shape[1]


def _check_classes(outputs: Any, data: Calibration) -> None:
    """Nothing, if the default loss fits."""
    logits = isinstance(outputs, jax.ShapeDtypeStruct)
    if not logits or len(outputs.shape) != 2 or not _floating(outputs):
        raise ScoreError(
            "the default loss, cross-entropy, takes one array of logits (B, K); the "
            f"model returns {shown(outputs)}: {OWN}"
        )
    if data.label_range is None or len(data.labels.shape) != 1:
        raise ScoreError(
            "the default loss, cross-entropy, takes integer labels of shape "
            f"({data.size},); found {shown(data.labels)}: take the argmax of one-hot "
            f"labels, squeeze a last axis of 1, or {OWN}"
        )
    low, high = data.label_range
    if low < 0 or high >= outputs.shape[1]:
        raise ScoreError(
            f"labels must be classes 0..{outputs.shape[1] - 1} of the model's logits "
            f"{shown(outputs)}; found labels from {low} to {high}: count classes from "
            f"0, or {OWN}"
        )


def _floating(struct: Any) -> bool:
    return jnp.issubdtype(struct.dtype, jnp.floating)
