"""What a draft step on the CPU does beside the model, in C++, so that calls of it can be recorded.

Shapes: B batch, K KV heads, S slots, D head size.
"""

from __future__ import annotations

from torch import Tensor

from vericache_compile.kernels import native
from vericache_compile.kernels.calls import NotRecordedError, call, recording

NO_LIMIT = (1 << 63) - 1


def begin_step(
    columns: Tensor, shifts: Tensor, positions: Tensor, limit: int | None, places: Tensor, shown: Tensor
) -> None:
    """places[..., b] = columns[b] + shifts[..., b], and shown [B, 1] is positions [B, 1], below `limit`; all int64."""
    library = native.load()
    assert library is not None, "ask `block_attention.serves` first"
    batch = columns.shape[0]
    bound = NO_LIMIT if limit is None else limit
    call(library.begin_step, columns, shifts, shifts.numel() // batch, batch, positions, bound, places, shown)


def write_rows(x: Tensor, buffer: Tensor, places: Tensor) -> None:
    """Write x [B, K, 1, D] to buffer [B, K, S, D], in its type, at slot places[b] of row b (int64); innermost strides
    are 1."""
    library = native.load()
    assert library is not None, "ask `block_attention.serves` first"
    if x.dtype is not buffer.dtype:  # under autocast
        if recording() is not None:
            raise NotRecordedError(f"{x.dtype} to a buffer of {buffer.dtype} is torch's")
        x = x.to(buffer.dtype)
    batch, heads, _, size = x.shape
    assert x.stride(-1) == buffer.stride(-1) == 1, "numbers of a key, and of a value, lie side by side"
    assert (batch, heads, size) == (*buffer.shape[:2], buffer.shape[3]), "a row per row of the batch and head"
    item = x.element_size()
    strides = (*x.stride()[:2], *buffer.stride()[:3])
    call(library.write_rows, x, buffer, places, batch, heads, size * item, *(stride * item for stride in strides))


def end_step(
    made: Tensor,
    forced: Tensor,
    first: Tensor,
    tokens: Tensor,
    drafted: Tensor,
    place: Tensor,
    positions: Tensor,
    columns: Tensor,
) -> None:
    """Each row's token made [B, 1], or first [B, 1] where it is forced (bool), becomes tokens [B, 1] and the row of
    drafted [H, B] behind `place` [1]; place, positions [B, 1] and columns [B] move on by one. All int64."""
    library = native.load()
    assert library is not None, "ask `block_attention.serves` first"
    assert made.is_contiguous(), "a token per row"
    call(library.end_step, made, forced, first, made.shape[0], tokens, drafted, place, positions, columns)
