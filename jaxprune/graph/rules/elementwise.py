"""Element-wise primitives, reductions and windows."""

# JAX types `aval` as its base class, which has no shape.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Sequence

from jax.extend import core as jex

from jaxprune.graph.atoms import Axis
from jaxprune.graph.interpret import TABLES, Value, Walk

ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt
ceil clamp clz complex conj convert_element_type copy copy_p cos cosh digamma div
eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow
is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul ne neg nextafter not
one_minus_square optimization_barrier or polygamma pow population_count real reduce_precision
regularized_incomplete_beta rem round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub
tan tanh xor zeta pvary mul_add sharding_constraint layout_constraint name reshard
""".split()

REDUCTIONS = """
reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax
argmin
""".split()

CUMULATIVE = "cumsum cumprod cummax cummin cumlogsumexp".split()

WINDOWS = """
reduce_window reduce_window_sum reduce_window_max reduce_window_min
select_and_scatter_add select_and_gather_add
""".split()


def unite_all(
    walk: Walk, values: Sequence[Value], shapes: Sequence[Sequence[int]], why: str
) -> tuple[Axis, ...]:
    """The axes of an element-wise result; operands of size 1 on an axis broadcast.

    shapes: those of the operands; rank-0 operands are passed over.
    """
    rank = max(len(shape) for shape in shapes)
    axes: list[Axis] = []
    for dim in range(rank):
        met = [
            value.axes[dim]
            for value, shape in zip(values, shapes, strict=True)
            if shape and shape[dim] != 1
        ]
        axis = met[0] if met else None
        for other in met[1:]:
            axis = walk.atoms.unite(axis, other, why)
        if any(other is None for other in met):
            axis = None
        axes.append(axis)
    return tuple(axes)


def elementwise(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    if eqn.primitive.name == "optimization_barrier":
        return [value.axes for value in values]
    shapes = [var.aval.shape for var in eqn.invars]
    why = _meets(walk, values, shapes)
    return [unite_all(walk, values, shapes, why) for _ in eqn.outvars]


def _meets(walk: Walk, values: Sequence[Value], shapes) -> str:
    """The reason for a pin, made only where an untracked axis meets a tracked one."""
    for dim in range(max(len(shape) for shape in shapes)):
        met = [
            v.axes[dim]
            for v, s in zip(values, shapes, strict=True)
            if s and s[dim] != 1
        ]
        if any(a is None for a in met) and any(a is not None for a in met):
            return (
                f"combined at {walk.where} with an array that has no channels there "
                f"(an input; or {TABLES})"
            )
    return ""


def reduction(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Drops the reduced axes; an index that comes out (argmax) freezes them."""
    gone = {int(axis) for axis in eqn.params["axes"]}
    if eqn.primitive.name.startswith("arg"):
        for value in values:
            pin = [value.axes[axis] for axis in gone]
            walk.pin(pin, f"{eqn.primitive.name} at {walk.where} returns a position")
    return [
        tuple(axis for dim, axis in enumerate(value.axes) if dim not in gone)
        for value in values[: len(eqn.outvars)]
    ]


def cumulative(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    why = f"{eqn.primitive.name} at {walk.where} runs along this axis"
    walk.atoms.freeze(values[0].axes[eqn.params["axis"]], why)
    return [values[0].axes]


def fft(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """The transformed axes, the last ones, are positions."""
    count = len(eqn.params["fft_lengths"])
    rest = values[0].axes[: len(values[0].axes) - count]
    walk.pin(values[0].axes[len(rest) :], f"fft at {walk.where} runs along this axis")
    return [(*rest, *(None,) * count)]


def ordering(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """sort and top_k: the order depends on every channel of the axis."""
    rank = len(values[0].axes)
    dim = int(eqn.params.get("dimension", eqn.params.get("axis", rank - 1))) % rank
    why = f"{eqn.primitive.name} at {walk.where} orders this axis"
    for value in values:
        walk.atoms.freeze(value.axes[dim], why)
    shapes = [var.aval.shape for var in eqn.invars]
    axes = unite_all(walk, values, shapes, _meets(walk, values, shapes))
    found = tuple(None if d == dim else axis for d, axis in enumerate(axes))
    return [found for _ in eqn.outvars]


def window(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Axes with a window of one pass; the others are positions. Of several operands
    (a maximum and where it lies) the windows move together. Windows side by side take
    blocks of channels together (maxout, pairs of filters)."""
    sizes, results = eqn.params["window_dimensions"], eqn.outvars
    why = f"{eqn.primitive.name} at {walk.where} slides over this axis"
    # Behind the operands of the others come initial values.
    paired = eqn.primitive.name.startswith("select_and")
    sources = values if paired else values[: len(results)]
    axes: list[Axis] = []
    for dim, size in enumerate(sizes):
        length = results[0].aval.shape[dim]
        met = [source.axes[dim] for source in sources]
        if size == 1 and all(a is None or a.size == length for a in met):
            axis = met[0]
            for other in met[1:]:
                axis = walk.atoms.unite(axis, other, why)
            axes.append(axis)
        elif len(met) == 1 and met[0] is not None and _side_by_side(eqn, dim):
            outer, inner = walk.atoms.split(met[0], (length, size))
            walk.atoms.freeze(inner, why)
            axes.append(outer)
        else:
            walk.pin(met, why)
            axes.append(None)
    return [tuple(axes) for _ in results]


def _side_by_side(eqn: jex.JaxprEqn, dim: int) -> bool:
    """Whether windows on an axis neither overlap nor leave anything out."""
    params, size = eqn.params, eqn.params["window_dimensions"][dim]
    plain = (
        params["window_strides"][dim] == size
        and tuple(params["padding"][dim]) == (0, 0)
        and params["base_dilation"][dim] == params["window_dilation"][dim] == 1
    )
    lengths = eqn.invars[0].aval.shape[dim], eqn.outvars[0].aval.shape[dim]
    return plain and lengths[0] == size * lengths[1]


def bitcast(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Element-wise between types of one width; else the last axis holds the parts."""
    axes, shape = list(values[0].axes), eqn.outvars[0].aval.shape
    if len(axes) > len(shape):
        walk.atoms.freeze(axes.pop(), f"bitcast at {walk.where} joins this axis")
    elif len(axes) < len(shape):
        axes.append(None)
    return [tuple(axes)]


def random_bits(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Noise adopts the channels of what it is added to or multiplied with.

    Drawn from a key that the source states it is a table, the same at every call: a
    smaller draw would be another one.
    """
    table = values[0].pure and not walk.tables
    return [
        tuple(None if table else walk.fresh(s) for s in var.aval.shape)
        for var in eqn.outvars
    ]


def untracked(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Keys, and what debugging calls see: nothing that comes out is a channel."""
    del walk, values
    return [(None,) * len(var.aval.shape) for var in eqn.outvars]


RULES = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(CUMULATIVE, cumulative),
    **dict.fromkeys(WINDOWS, window),
    "sort": ordering,
    "top_k": ordering,
    "approx_top_k": ordering,
    "bitcast_convert_type": bitcast,
    "fft": fft,
    "debug_callback": untracked,
    "debug_print": untracked,
    "random_bits": random_bits,
    "random_seed": untracked,
    "random_wrap": untracked,
    "random_unwrap": untracked,
    "random_fold_in": untracked,
    "random_split": untracked,
    "random_clone": untracked,
    "threefry2x32": untracked,
}
