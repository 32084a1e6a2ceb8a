"""The pruning ratio that the script of seed 004 reports, from a graph and a plan."""

# JAX types `aval` as its base class, which has no shape.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from jaxprune import trees
from jaxprune.criteria.redundancy import SeedLayer, seed_pruning_ratio
from jaxprune.graph import ChannelGraph
from jaxprune.records import Plan


def seed_layers(graph: ChannelGraph, plan: Plan) -> list[SeedLayer]:
    """The convolutions and Dense layers whose outputs can be pruned, in network order.

    The classifier is not among them, as in the script.
    """
    leaves = trees.flatten(graph.variables)
    made = {
        slot.path: group
        for group in graph.groups
        for slot in group.producers
        if slot.axis == len(leaves[slot.path].shape) - 1
    }
    kinds = {"conv_general_dilated": "conv", "dot_general": "dense"}
    found = []
    for record in graph.records.values():
        leaf_names = [value.leaf or "" for value in record.inputs]
        paths = [name for name in leaf_names if name in made]
        if record.name not in kinds or not paths:
            continue
        shape = leaves[paths[0]].shape
        height = width = 1
        if record.name == "conv_general_dilated":
            layout = record.eqn.params["dimension_numbers"].out_spec
            output = record.eqn.outvars[0].aval.shape
            height, width = (output[axis] for axis in layout[2:4])
        found.append(
            SeedLayer(
                kinds[record.name],
                shape[0] if len(shape) > 2 else 1,
                shape[-2],
                shape[-1],
                height,
                width,
                len(plan[made[paths[0]].name]),
            )
        )
    return found


def seed_ratio(graph: ChannelGraph, plan: Plan) -> float:
    """MACs before over MACs after as the script counts them, see `seed_pruning_ratio`.

    Its formula is of a chain of layers; it means little for any other network.
    """
    layers = seed_layers(graph, plan)
    channels = layers[0].inputs if layers else 3
    return seed_pruning_ratio(layers, image_channels=channels)
