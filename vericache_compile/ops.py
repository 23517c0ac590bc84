"""The canonical operators that passes rewrite a model into: schema, fake and eager kernels, window rule; no state.

Shapes: B batch, T tokens, H query heads, K KV heads, C columns of past, D head size, E value head size, W window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vericache_compile.kernels.row_invariant_linear import is_row_invariant, row_invariant_linear


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
) -> Tensor:
    """Attend from new tokens over a row's past columns [pads, lengths) and, causally, over the new tokens.

    q [B, H, T, D], k [B, K, T, D], v [B, K, T, E], past_k [B, K, C, D], past_v [B, K, C, E], lengths and pads
    [B] (int64), scale multiplies the scores. Whatever other columns hold (NaN too) is not read. Returns
    [B, H, T, E].
    """
    batch, heads, tokens, _ = q.shape
    columns = past_k.shape[2]
    column = torch.arange(columns, device=q.device)
    seen = (column >= pads[:, None]) & (column < lengths[:, None])
    past = seen[:, None, None, :].expand(batch, 1, tokens, columns)
    new = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    visible = torch.cat([past, new.expand(batch, 1, tokens, tokens)], dim=-1)
    unseen = ~seen[:, None, :, None]
    return F.scaled_dot_product_attention(
        q,
        torch.cat([past_k.masked_fill(unseen, 0), k], dim=2),
        torch.cat([past_v.masked_fill(unseen, 0), v], dim=2),
        attn_mask=visible,
        scale=scale,
        enable_gqa=heads != k.shape[1],
    ).contiguous()


@attend.register_fake
def _attend_fake(q, k, v, past_k, past_v, lengths, pads, scale, layer):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


def _attend_window(info, in_dims, q, k, v, past_k, past_v, lengths, pads, scale, layer):  # type: ignore[no-untyped-def]
    """W one-token calls become one call on W tokens: the window is the token axis of the canonical operator."""
    if any(d is not None for d in in_dims[3:]):
        raise NotImplementedError("only queries, keys and values differ over a window")
    q, k, v = (_as_tokens(x, d, info.batch_size) for x, d in zip((q, k, v), in_dims[:3], strict=True))
    out = attend(q, k, v, past_k, past_v, lengths, pads, scale, layer)
    return out.permute(2, 0, 1, 3).unsqueeze(3), 0


def _as_tokens(x: Tensor, dim: int | None, window: int) -> Tensor:
    """[W, B, H, 1, D] (W at `dim`) to [B, H, W, D]."""
    if dim is None:
        return x.expand(-1, -1, window, -1)
    return x.movedim(dim, 0).squeeze(3).permute(1, 2, 0, 3)


torch.library.register_vmap("vericache::attend", _attend_window)


@torch.library.custom_op("vericache::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One GEMM over all leading axes: x [..., in], weight [out, in], bias [out] or None. Returns [..., out].

    By oneDNN on the CPU and a kernel of ours on a GPU, where they take the weight: a row's bits then do not depend on
    where it stands among the others, nor on what they hold (`tests/test_ops.py` tries it for many row counts).
    """
    if is_row_invariant(weight):
        return row_invariant_linear(x, weight, bias)
    if has_onednn(weight):
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
        return made
    return F.linear(x, weight, bias).contiguous()


def keeps_rows_apart(weight: Tensor) -> bool:
    """Whether `linear` gives a row the same bits wherever it stands, for a weight as it lies in memory."""
    return has_onednn(weight) or is_row_invariant(weight)


def has_onednn(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by a weight [out, in] as it lies in memory."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn or not weight.is_contiguous():
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


@linear.register_fake
def _linear_fake(x, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_window(info, in_dims, x, weight, bias):  # type: ignore[no-untyped-def]
    """The window is one more leading axis of the same GEMM; the weight is never expanded."""
    if in_dims[1] is not None or in_dims[2] is not None:
        raise NotImplementedError("a weight differs over the window")
    return linear(x.movedim(in_dims[0], 0), weight, bias), 0


torch.library.register_vmap("vericache::linear", _linear_window)


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


ATTEND = torch.ops.vericache.attend.default
"""The node target of a site."""
PREFETCH = torch.ops.vericache.prefetch.default
"""The node target of a request for a site's full KV."""
WAIT = torch.ops.vericache.wait.default
"""The node target of a wait for one side, keys or values, of a site's full KV."""
OUTSIDE = (ATTEND, PREFETCH, WAIT)
"""What runs between segments, not in them."""
LINEAR = torch.ops.vericache.linear.default
"""The node target of a product with a weight."""
