"""Patterns of sequence models, and of programs with loops, inputs or outputs of their own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from pattern_registry import PATTERNS, TOKENS, conv, head, pattern

# Sequences ------------------------------------------------------------------------


@pattern("up", x=TOKENS)
def glu(x):
    gate, value = jnp.split(nn.Dense(12, name="up")(x), 2, -1)
    x = x + nn.Dense(8, name="down")(nn.silu(gate) * value)
    return head(x)


@pattern("embed", "token", "channel", x=TOKENS)
def mixer(x):
    x = nn.Dense(10, name="embed")(x)
    y = nn.LayerNorm(name="n0")(x).swapaxes(1, 2)
    y = nn.Dense(6, name="token_out")(nn.gelu(nn.Dense(7, name="token")(y)))
    x = x + y.swapaxes(1, 2)
    y = nn.gelu(nn.Dense(9, name="channel")(nn.LayerNorm(name="n1")(x)))
    return head(x + nn.Dense(10, name="channel_out")(y))


@pattern("a", x=TOKENS)
def concat_last_axis_of_a_sequence(x):
    a = nn.relu(nn.Dense(6, name="a")(x))
    b = nn.relu(nn.Dense(5, name="b")(x))
    c = jnp.concatenate([a.swapaxes(1, 2), b.swapaxes(1, 2)], 1).swapaxes(1, 2)
    return head(nn.relu(nn.Dense(7, name="c")(c)))


@pattern("embed", "att/query", "att/value", "mlp", x=TOKENS)
def attention(x):
    x = nn.Dense(12, name="embed")(x)
    y = nn.LayerNorm(name="norm")(x)
    x = x + nn.MultiHeadDotProductAttention(4, qkv_features=16, name="att")(y, y)
    y = nn.gelu(nn.Dense(9, name="mlp")(nn.LayerNorm(name="norm2")(x)))
    return head(x + nn.Dense(12, name="out")(y))


@pattern("att/query", "att/value", x=TOKENS)
def attention_with_normed_queries(x):
    att = nn.MultiHeadDotProductAttention(
        4, qkv_features=24, normalize_qk=True, use_bias=False, name="att"
    )
    return head(att(x, x))


def _attend(q, k, v):
    """Heads at axis -2: (B, T, H, D)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)


def _project(x):
    x = x.reshape(*x.shape[:2], -1)
    return head(nn.relu(nn.Dense(6, name="project")(x)))


def _heads(features, heads, name):
    return nn.DenseGeneral((heads, features), name=name)


@pattern("q", "v", x=TOKENS)
def gqa_by_repeat(x):
    q, k, v = _heads(6, 4, "q")(x), _heads(6, 2, "k")(x), _heads(5, 2, "v")(x)
    rep = q.shape[2] // k.shape[2]
    return _project(_attend(q, jnp.repeat(k, rep, 2), jnp.repeat(v, rep, 2)))


@pattern("q", "v", x=TOKENS)
def gqa_by_reshape(x):
    q, k, v = _heads(6, 4, "q")(x), _heads(6, 2, "k")(x), _heads(5, 2, "v")(x)
    b, t, h, d = q.shape
    q = q.reshape(b, t, k.shape[2], h // k.shape[2], d)
    scores = nn.softmax(jnp.einsum("bqhgd,bkhd->bhgqk", q, k) / np.sqrt(d))
    return _project(jnp.einsum("bhgqk,bkhd->bqhgd", scores, v))


@pattern("q", x=TOKENS)
def multi_query(x):
    q, k, v = _heads(6, 4, "q")(x), nn.Dense(6, name="k")(x), nn.Dense(5, name="v")(x)
    scores = nn.softmax(jnp.einsum("bqhd,bkd->bhqk", q, k) * q.shape[-1] ** -0.5)
    return _project(jnp.einsum("bhqk,bkd->bqhd", scores, v))


@pattern("qkv", x=TOKENS)
def fused_qkv_by_split(x):
    parts = jnp.split(nn.Dense(48, name="qkv")(x), 3, -1)
    q, k, v = (p.reshape(*p.shape[:2], 4, -1) for p in parts)
    return _project(_attend(q, k, v))


@pattern("qkv", x=TOKENS)
def fused_qkv_by_reshape(x):
    qkv = nn.Dense(48, name="qkv")(x)
    qkv = qkv.reshape(*qkv.shape[:2], 3, 4, -1).transpose(2, 0, 1, 3, 4)
    return _project(_attend(qkv[0], qkv[1], qkv[2]))


@pattern("qkv", x=TOKENS)
def fused_qkv_within_heads(x):
    qkv = nn.Dense(48, name="qkv")(x)
    qkv = qkv.reshape(*qkv.shape[:2], 4, -1)
    return _project(_attend(*jnp.split(qkv, 3, -1)))


def _rope(x):
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] / 100 ** (np.arange(half) / half)
    sin, cos = np.sin(angles)[:, None], np.cos(angles)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


@pattern("q", "v", x=TOKENS)
def rope(x):
    q, k, v = _heads(6, 4, "q")(x), _heads(6, 4, "k")(x), _heads(5, 4, "v")(x)
    return _project(_attend(_rope(q), _rope(k), v))


class RelativePositions(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (_heads(6, 4, name)(x) for name in "qkv")
        table = self.param("table", nn.initializers.normal(), (11, 4))
        place = np.arange(6)[:, None] - np.arange(6) + 5
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
        scores = scores + table[place].transpose(2, 0, 1)
        return _project(jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v))


PATTERNS["relative_positions"] = (RelativePositions(), TOKENS, ("v",))


@pattern("embed", x=np.arange(12).reshape(2, 6) % 11)
def tied_embedding(x):
    embed = nn.Embed(11, 8, name="embed")
    x = embed(x)
    x = x + nn.Dense(8, name="down")(nn.relu(nn.Dense(9, name="up")(x)))
    return embed.attend(x)


@pattern("embed", "up", x=TOKENS)
def mixture_of_experts(x):
    x = nn.Dense(10, name="embed")(x)
    weights, chosen = jax.lax.top_k(nn.softmax(nn.Dense(4, name="router")(x)), 2)
    gate = (jax.nn.one_hot(chosen, 4) * weights[..., None]).sum(-2)
    many = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    dense = nn.vmap(nn.Dense, in_axes=None, out_axes=-2, axis_size=4, **many)
    y = nn.relu(dense(9, name="up")(x))
    dense = nn.vmap(nn.Dense, in_axes=-2, out_axes=-2, axis_size=4, **many)
    y = dense(10, name="down")(y)
    return head(x + (y * gate[..., None]).sum(-2))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.gelu(nn.Dense(9, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(x.shape[-1], name="down")(y), None


@pattern("embed", "up", x=TOKENS)
def scanned_remat_stack(x):
    x = nn.Dense(10, name="embed")(x)
    stack = nn.scan(
        nn.remat(Block),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
    )
    return head(stack(name="stack")(x, None)[0])


def _recurrent(cell, **options):
    def body(x):
        x = nn.relu(nn.Dense(7, name="embed")(x))
        x = nn.RNN(cell(6, name="cell"), **options)(x)
        return head(nn.relu(nn.Dense(5, name="out")(x)))

    return body


for _cell in (nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.MGUCell, nn.SimpleCell):
    _body = _recurrent(_cell)
    _body.__name__ = _cell.__name__.lower()
    pattern("embed", "cell", "out", x=TOKENS)(_body)


@pattern("embed", "out", x=TOKENS)
def bidirectional(x):
    x = nn.relu(nn.Dense(7, name="embed")(x))
    ahead, back = nn.RNN(nn.LSTMCell(6, name="f")), nn.RNN(nn.GRUCell(5, name="g"))
    x = nn.Bidirectional(ahead, back)(x)
    return head(nn.relu(nn.Dense(5, name="out")(x)))


@pattern("out", x=(2, 3, 6, 6, 2))
def conv_lstm(x):
    x = nn.RNN(nn.ConvLSTMCell(4, (3, 3), name="cell"))(x)
    return head(nn.relu(nn.Dense(5, name="out")(x)))


@pattern("a", "b", x=TOKENS)
def einsum_layers(x):
    x = nn.Einsum((8, 3, 4), "btc,chd->bthd", name="a")(x)
    x = nn.Einsum((3, 4, 9), "bthd,hde->bte", name="b")(nn.relu(x))
    return head(nn.relu(x))


@pattern("a", "b", x=TOKENS)
def norms_and_gates(x):
    x = nn.RMSNorm(name="rms")(nn.Dense(8, name="a")(x))
    x = nn.PReLU(name="prelu")(x)
    return head(nn.swish(nn.Dense(6, name="b")(x)))


@pattern("a", "b", x=((2, 5), (2, 4)))
def two_inputs(x, y):
    x = nn.relu(nn.Dense(6, name="a")(x) + nn.Dense(6, name="a2")(y))
    return nn.Dense(3, name="head")(nn.relu(nn.Dense(5, name="b")(x)))


@pattern("a", x=(2, 5))
def several_outputs(x):
    x = nn.relu(nn.Dense(6, name="a")(x))
    y = nn.relu(nn.Dense(5, name="b")(x))
    return {"features": y, "logits": nn.Dense(3, name="head")(y)}


@pattern("a", "b", x=(2, 5))
def linear_bottleneck_by_matmul(x):
    x = nn.relu(nn.Dense(6, name="a")(x))
    y = nn.Dense(6, name="a2")(x)
    return nn.Dense(3, name="head")(nn.relu(nn.Dense(7, name="b")((x @ y.T) @ x)))


@pattern("a", "b")
def while_and_cond(x):
    x = nn.relu(conv(6, "a")(x))

    def body(state):
        return state[0] + 1, jnp.tanh(state[1]) * 1.5

    _, x = jax.lax.while_loop(lambda s: s[0] < 3, body, (0, x))
    x = jax.lax.cond(x.sum() > 0, lambda v: v * 2, lambda v: v - 1, x)
    x = jax.lax.fori_loop(0, 2, lambda k, v: v + 0.1 * k, x)
    return head(nn.relu(conv(5, "b")(x)))


@pattern("filters", "pieces", x=TOKENS)
def windows_over_channels(x):
    """Filters pooled in pairs (LEAF) and maxout, written with windows of Flax."""
    x = nn.Dense(12, name="filters")(x).swapaxes(1, 2)
    x = 2 * nn.avg_pool(x**2, (2,), (2,)).swapaxes(1, 2)
    x = nn.Dense(15, name="pieces")(x).swapaxes(1, 2)
    return head(nn.max_pool(x, (3,), (3,)).swapaxes(1, 2))
