"""Training: fit, evaluate, and the repair of BatchNorm statistics."""

from jaxprune.train.evaluation import evaluate, recalibrate_batch_norm
from jaxprune.train.loop import fit

__all__ = ["evaluate", "fit", "recalibrate_batch_norm"]
