"""The canonical operators that passes rewrite a model into: schema, fake and eager kernels, window rule; no state.

Shapes: B batch, T tokens, H query heads, K KV heads, C columns of past, D head size, E value head size, W window.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vericache_compile.kernels.calls import CALLING, recording
from vericache_compile.kernels.int8_linear import int8_linear
from vericache_compile.kernels.row_invariant_linear import (
    Wanted,
    is_row_invariant,
    multiplies_bfloat16,
    row_invariant_by_head,
    row_invariant_linear,
)

WANTED: ContextVar[Wanted] = ContextVar("vericache_wanted", default=None)
"""How many of a window's tokens there are, while verify runs; None: all; an array for calls that are recorded, which
read it when they run. What an operator gives for those beyond is the first token's, where that is less work: nobody
reads it, and it is as harmless as what the first token is given."""


def filled(made: Tensor, count: int, axis: int = 0) -> Tensor:
    """What was made of a window's first tokens, then that of its first token: `count` along the window's axis."""
    sizes, have = list(made.shape), made.shape[axis]
    if have == count:
        return made
    if have == 1:
        sizes[axis] = count
        return made.expand(sizes).contiguous()
    sizes[axis] = count - have
    return torch.cat([made, made.narrow(axis, 0, 1).expand(sizes)], dim=axis)


@torch.library.custom_op("vericache::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    lengths: Tensor,
    pads: Tensor,
    scale: float,
    layer: int,
    window: int | None = None,
    sinks: Tensor | None = None,
    soft_cap: float | None = None,
    slopes: list[float] | None = None,
    slope_dtype: torch.dtype = torch.float32,
    relative: bool = False,
    latent: bool = False,
) -> Tensor:
    """Attend from new tokens over a row's past columns [pads, lengths) and, causally, over the new tokens.

    q [B, H, T, D], k [B, K, T, D], v [B, K, T, E], past_k [B, K, C, D], past_v [B, K, C, E], lengths and pads
    [B] (int64), scale multiplies the scores. With a window a token sees that many columns, its own included, and
    past_k and past_v hold the C columns before `lengths`. Whatever other columns hold (NaN too) is not read. Then
    scores s become soft_cap * tanh(s / soft_cap), slopes[h] * place is added (see `plan.Alibi`), and sinks [H] take
    part in the softmax without a value. With `latent` (see `plan.Site`) the cached keys are [past_k, past_v], side by
    side, and the cached values past_k [B, 1, C, E]. Returns [B, H, T, E].
    """
    if latent:
        past_k, past_v = torch.cat([past_k, past_v], dim=-1), past_k
    batch, heads, tokens, _ = q.shape
    columns = past_k.shape[2]
    column = torch.arange(columns, device=q.device)[None]
    if window is not None:
        column = column + (lengths - columns)[:, None]
    seen = (column >= pads[:, None]) & (column < lengths[:, None])
    past = seen[:, None, None, :].expand(batch, 1, tokens, columns)
    new = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    own = lengths[:, None] + torch.arange(tokens, device=q.device)
    if window is not None:
        past = past & (column[:, None, None, :] > own[:, None, :, None] - window)
        new = new.triu(1 - window)
    visible = torch.cat([past, new.expand(batch, 1, tokens, tokens)], dim=-1)
    unseen = ~seen[:, None, :, None]
    keys, values = (torch.cat([old.masked_fill(unseen, 0), fresh], dim=2) for old, fresh in ((past_k, k), (past_v, v)))
    if sinks is None and soft_cap is None and slopes is None:
        gqa = heads != k.shape[1]
        made = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, scale=scale, enable_gqa=gqa)
        return made.contiguous()
    keys, values = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (keys, values))
    scores = (q @ keys.transpose(2, 3)).float() * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if slopes is not None:
        places = torch.cat([column.expand(batch, -1), own], dim=1)
        places = places[:, None] - (own[:, :, None] if relative else pads[:, None, None])
        bias = torch.tensor(slopes, dtype=slope_dtype, device=q.device)[:, None, None] * places[:, None].to(slope_dtype)
        scores = scores + bias.float()
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(batch, -1, tokens, 1)], dim=-1)
    return (scores.softmax(-1)[..., : visible.shape[-1]].to(values.dtype) @ values).contiguous()


@attend.register_fake
def _attend_fake(q, k, v, past_k, past_v, lengths, pads, scale, layer, *_):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


def _attend_window(info, in_dims, q, k, v, *given):  # type: ignore[no-untyped-def]
    """W one-token calls become one call on W tokens: the window is the token axis of the canonical operator."""
    if any(d is not None for d in tree_leaves(in_dims[3:])):
        raise NotImplementedError("only queries, keys and values differ over a window")
    q, k, v = (_as_tokens(x, d, info.batch_size) for x, d in zip((q, k, v), in_dims[:3], strict=True))
    return attend(q, k, v, *given).permute(2, 0, 1, 3).unsqueeze(3), 0


def _as_tokens(x: Tensor, dim: int | None, window: int) -> Tensor:
    """[W, B, H, 1, D] (W at `dim`) to [B, H, W, D]."""
    if dim is None:
        return x.expand(-1, -1, window, -1)
    return x.movedim(dim, 0).squeeze(3).permute(1, 2, 0, 3)


torch.library.register_vmap("vericache::attend", _attend_window)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, window: bool = False) -> Tensor:
    """One GEMM over all leading axes: x [..., in], weight [out, in], bias [out] or None. Returns [..., out].

    By a kernel of ours, or oneDNN, where they take the weight: a row's bits then do not depend on where it stands among
    the others, nor on what they hold (`tests/test_ops.py` tries it for many row counts). Whether x is that of a
    `window`, its first axis, is for `WANTED`.
    """
    wanted = WANTED.get() if window else None
    if is_row_invariant(weight):
        return row_invariant_linear(x, weight, bias, wanted)
    if (calls := recording()) is not None:
        with torch.inference_mode(False):  # it is written in any mode
            out = x.new_empty((*x.shape[:-1], weight.shape[0]))
        calls.run(lambda: _multiply_into(out, x, weight, bias, wanted))
        return out
    assert wanted is None or isinstance(wanted, int), "an array is for calls that are recorded"
    return _multiply_any(x, weight, bias, wanted)


def _multiply_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted) -> None:
    known = wanted if wanted is None or isinstance(wanted, int) else wanted[0]
    out.copy_(_multiply_any(x, weight, bias, known))


def _multiply_any(x: Tensor, weight: Tensor, bias: Tensor | None, wanted: int | None) -> Tensor:
    return _onednn(x, weight, bias, wanted) if has_onednn(weight) else F.linear(x, weight, bias).contiguous()


# not by `custom_op`: what that adds for gradients, which nothing here has, takes each call as long again
SCHEMA = "(Tensor x, Tensor weight, Tensor? bias, bool window=False) -> Tensor"
torch.library.define("vericache::linear", SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
torch.library.impl("vericache::linear", "default", _linear)


def keeps_rows_apart(weight: Tensor) -> bool:
    """Whether `LINEAR` gives a row the same bits wherever it stands, for a weight as it lies in memory."""
    return has_onednn(weight) or is_row_invariant(weight)


def has_onednn(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by a weight [out, in] as it lies in memory."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn or not weight.is_contiguous():
        return False
    return weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and multiplies_bfloat16())


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, wanted: int | None = None) -> Tensor:
    """x [..., in] by weight [out, in], by oneDNN, each row with the bits that it has among all; along the first axis
    only the first `wanted` (None: all) need be right."""
    rows, outs = x.reshape(-1, x.shape[-1]), weight.shape[0]
    if wanted is None or wanted >= x.shape[0]:
        return _multiply(rows, weight, bias).view(*x.shape[:-1], outs)
    token = rows.shape[0] // x.shape[0]
    count = token * min(1 << (wanted - 1).bit_length(), x.shape[0])  # few numbers of tokens are to be tried
    enough = _rows_enough(weight.shape, weight.dtype, bias is not None, rows.shape[0], count, torch.get_num_threads())
    made = _multiply(rows[:enough], weight, bias)
    return filled(made[: token * wanted].view(wanted, *x.shape[1:-1], outs), x.shape[0])


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Rows [M, in] by weight [out, in], by oneDNN, filled up to as many that each has the same bits at every place."""
    missing = 0 if _are_rows_alike() else fill(rows.shape[0])
    given = F.pad(rows, (0, 0, 0, missing)) if missing else rows.contiguous()
    made: Tensor = torch.ops.mkldnn._linear_pointwise.default(given, weight, bias, "none", [], "")
    return made[: rows.shape[0]] if missing else made


@cache
def _rows_enough(shape: torch.Size, dtype: torch.dtype, has_bias: bool, rows: int, wanted: int, threads: int) -> int:
    """The fewest of `rows` rows, `wanted` or more, that oneDNN multiplies by a weight of this shape as it does among
    all of them: for few it may sum in another order. Tried once, with products that cancel each other out, so that
    what is left of a sum is how it was taken.
    """
    outs, size = shape
    if min(shape) < TELLING:
        return rows  # too little is left to tell by
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, sign: int) -> Tensor:
        half = torch.randn(count, size // 2, generator=generator, dtype=torch.float32, device="cpu")
        return torch.cat([half, sign * half, torch.zeros(count, size % 2, dtype=torch.float32, device="cpu")], dim=1)

    order = torch.randperm(size, generator=generator, device="cpu")
    x, part = (draw(*each)[:, order].to(dtype) for each in ((rows, -1), (TELLING, 1)))
    weight = part.repeat(-(-outs // TELLING), 1)[:outs].contiguous()
    bias = torch.full((outs,), 2.0**-20, dtype=dtype, device="cpu") if has_bias else None  # as small as what is left
    whole = _multiply(x, weight, bias)
    least, enough = wanted, rows
    while least < enough:
        middle = (least + enough) // 2
        if torch.equal(_multiply(x[:middle], weight, bias)[:wanted], whole[:wanted]):
            enough = middle
        else:
            least = middle + 1
    return enough


def fill(rows: int) -> int:
    """Rows to add where float32 is multiplied in tiles of six rows, and one to three that are left over in another way.

    So does oneDNN 3.10 (torch 2.11) with AVX2 and no AVX-512; 3.12 (torch 2.13) does not.
    """
    return {1: 3, 2: 2, 3: 1}.get(rows % TILE, 0) if rows > TILE else 0


@cache
def _are_rows_alike() -> bool:
    """Whether oneDNN multiplies seven, eight and nine rows of float32 alike, whatever their order: tried once."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> Tensor:
        """Whatever the caller's default device and type are."""
        return torch.randn(rows, 64, generator=generator, dtype=torch.float32, device="cpu")

    weight = draw(97)

    def multiply(x: Tensor) -> Tensor:
        made: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
        return made

    return all(
        torch.equal(multiply(x.flip(0).contiguous()), multiply(x).flip(0)) for x in map(draw, range(TILE + 1, TILE + 4))
    )


@torch.library.register_fake("vericache::linear")
def _linear_fake(x, weight, bias, window=False):  # type: ignore[no-untyped-def]
    assert x.dtype is weight.dtype, f"{x.dtype} by a weight of {weight.dtype}"
    assert bias is None or bias.shape == weight.shape[:1], f"a bias of {bias.shape} for {weight.shape[0]} outputs"
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_window(info, in_dims, x, weight, bias, window=False):  # type: ignore[no-untyped-def]
    """The window is one more leading axis of the same GEMM; the weight is never expanded."""
    if in_dims[1] is not None or in_dims[2] is not None:
        raise NotImplementedError("a weight differs over the window")
    return LINEAR(x.movedim(in_dims[0], 0), weight, bias, True), 0


torch.library.register_vmap("vericache::linear", _linear_window)


torch.library.define(
    "vericache::int8_linear",
    "(Tensor x, Tensor[] codes, Tensor[] scales, int[] outs) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("vericache::int8_linear", "default", int8_linear)


@torch.library.register_fake("vericache::int8_linear")
def _int8_linear_fake(x, codes, scales, outs):  # type: ignore[no-untyped-def]
    return [x.new_empty((x.shape[0], count)) for count in outs]


@torch.library.custom_op("vericache::heads_mm", mutates_args=())
def heads_mm(x: Tensor, weight: Tensor) -> Tensor:
    """Each head's rows by its own weight: x [..., H, in], weight [H, in, out]. Returns [..., H, out].

    As in `LINEAR`, a row's bits do not depend on where it stands among the others, nor on what they hold.
    """
    flat = x.flatten(0, -3)
    if is_row_invariant(weight):
        made = row_invariant_by_head(flat, weight.mT)
    else:
        made = torch.stack([_rows_apart(flat[:, head], own.t()) for head, own in enumerate(weight)], dim=1)
    return made.view(*x.shape[:-1], weight.shape[2])


def _rows_apart(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, in] by weight [out, in], either way round in memory."""
    if has_onednn(weight) or has_onednn(weight.t()):
        return _multiply(x, weight, None)
    count = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -count % ROWS)) if count > 2 else x
    return F.linear(padded, weight)[:count]


@heads_mm.register_fake
def _heads_mm_fake(x, weight):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[2]))


def _heads_mm_window(info, in_dims, x, weight):  # type: ignore[no-untyped-def]
    """The window is one more leading axis of each head's rows."""
    if in_dims[1] is not None:
        raise NotImplementedError("a weight differs over the window")
    return heads_mm(x.movedim(in_dims[0], 0), weight), 0


torch.library.register_vmap("vericache::heads_mm", _heads_mm_window)


@torch.library.custom_op("vericache::prefetch", mutates_args=())
def prefetch(lengths: Tensor, layer: int) -> Tensor:
    """Ask for a site's full KV, columns [0, lengths) of each row, without waiting; asking twice is asking once.

    Returns a ticket ([1], int64) for `wait`. Where the cache is an input of the graph, as here, there is nothing to do.
    """
    return torch.full((1,), layer, device=lengths.device)


@prefetch.register_fake
def _prefetch_fake(lengths, layer):  # type: ignore[no-untyped-def]
    return lengths.new_empty((1,))


@torch.library.custom_op("vericache::wait", mutates_args=())
def wait(past: Tensor, ticket: Tensor, layer: int) -> Tensor:
    """A site's keys or values [B, K, C, *] once they are there: attention reads what this returns, not `past`."""
    assert ticket.item() == layer, f"site {layer} waits with the ticket of site {ticket.item()}"
    return past.clone()


@wait.register_fake
def _wait_fake(past, ticket, layer):  # type: ignore[no-untyped-def]
    return torch.empty_like(past)


@torch.library.custom_op("vericache::experts_mm", mutates_args=())
def experts_mm(x: Tensor, weight: Tensor, experts: Tensor, rows: int) -> Tensor:
    """Each row by the weight of its own expert: x [..., in], weight [E, in, out], experts [...] (int64; a row of expert
    E or beyond becomes zeros). Returns [..., out].

    An expert's rows are one GEMM, or (`rows` > 0) GEMMs of exactly that many, filled up with zeros: a row's bits then
    do not depend on how many others chose the same expert.
    """
    flat, chosen = x.flatten(0, -2), experts.flatten()
    out = x.new_zeros((flat.shape[0], weight.shape[2]))
    for expert in sorted(set(chosen.tolist())):
        own = (chosen == expert).nonzero()[:, 0]
        for part in own.split(rows or own.shape[0]) if expert < weight.shape[0] else ():
            given = F.pad(flat[part], (0, 0, 0, rows - part.shape[0])) if rows else flat[part]
            out[part] = _linear(given, weight[expert].t(), None)[: part.shape[0]]
    return out.view(*x.shape[:-1], weight.shape[2])


@experts_mm.register_fake
def _experts_mm_fake(x, weight, experts, rows):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[2]))


def _experts_mm_window(info, in_dims, x, weight, experts, rows):  # type: ignore[no-untyped-def]
    """The rows of all tokens of a window are put to their experts together."""
    if in_dims[1] is not None:
        raise NotImplementedError("a weight differs over the window")
    x, experts = (
        value.movedim(dim, 0) if dim is not None else value.expand(info.batch_size, *value.shape)
        for value, dim in ((x, in_dims[0]), (experts, in_dims[2]))
    )
    return experts_mm(x, weight, experts, EXPERT_ROWS), 0


torch.library.register_vmap("vericache::experts_mm", _experts_mm_window)

ROWS = 4
"""Row counts above 2 are filled up to a multiple of this where a library was seen to keep rows apart only then."""
TELLING = 64
"""Products of a sum, and sums, from which on two orders of summing are told apart by the bits that are left."""
TILE = 6
"""Rows of a tile, where oneDNN treats those that are left over in another way."""
EXPERT_ROWS = 16
"""Rows per GEMM of an expert in verify."""

ATTEND = torch.ops.vericache.attend.default
"""The node target of a site."""
LAYER = 8
"""The place of the site's number among its arguments."""
PREFETCH = torch.ops.vericache.prefetch.default
"""The node target of a request for a site's full KV."""
WAIT = torch.ops.vericache.wait.default
"""The node target of a wait for one side, keys or values, of a site's full KV."""
OUTSIDE = (ATTEND, PREFETCH, WAIT)
"""What runs between segments, not in them."""
EXPERTS_MM = torch.ops.vericache.experts_mm.default
"""The node target of a product with the weights of chosen experts; it waits for the host, which reads the choice."""
HEADS_MM = torch.ops.vericache.heads_mm.default
"""The node target of a product of each head's rows with a weight of its own."""
INT8_LINEAR = torch.ops.vericache.int8_linear.default
"""The node target of products of the same rows with int8 copies of weights, see `kernels/int8_linear.py`."""
LINEAR = torch.ops.vericache.linear.default
"""The node target of a product with a weight."""
CALLING.update({INT8_LINEAR: int8_linear, LINEAR: _linear})
