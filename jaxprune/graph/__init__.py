"""The channel graph: which slices of which arrays form a channel."""

from jaxprune.graph.evaluate import evaluate, tree_arguments
from jaxprune.graph.graph import ChannelGraph, build
from jaxprune.graph.interpret import Record, Site, Value
from jaxprune.graph.pins import Frozen, Outputs

__all__ = [
    "ChannelGraph",
    "Frozen",
    "Outputs",
    "Record",
    "Site",
    "Value",
    "build",
    "evaluate",
    "tree_arguments",
]
