"""How each primitive moves and ties channels: the only place that knows primitives.

A rule takes the walk, the equation and its operands, and returns the axes of each
result. A primitive without a rule freezes what it touches and is listed by name.
"""

from jaxprune.graph.interpret import Rule
from jaxprune.graph.rules import contraction, control, elementwise, indexing, layout

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **contraction.RULES,
    **layout.RULES,
    **indexing.RULES,
    **control.RULES,
}
