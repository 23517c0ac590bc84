"""Attention over blocks of 256 columns on the CPU, of float32 or bfloat16, in float32.

`vericache_compile.runtime.attention` is its reference, and runs wherever this kernel does not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vericache_compile.kernels import native
from vericache_compile.kernels.calls import Argument, call, side_by_side

BLOCK = 256
SIZES = ("batch", "heads", "kv_heads", "window", "size", "value_size")
STRIDES = tuple(f"{tensor}_{axis}" for tensor in "qkv" for axis in ("batch", "head", "row"))


class Shape(ctypes.Structure):
    """`struct Shape` of the C++ file."""

    _fields_ = [(name, ctypes.c_int64) for name in SIZES + STRIDES]


class Score(ctypes.Structure):
    """`struct Score` of the C++ file."""

    _fields_ = [
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("sinks", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("bias_row", ctypes.c_int64),
        ("relative", ctypes.c_int64),
    ]


class Scores(NamedTuple):
    """What is done to the products of queries and keys beside scaling them, in this order."""

    soft_cap: float | None = None
    """s becomes soft_cap * tanh(s / soft_cap)."""
    bias: Tensor | None = None
    """[H, P] float32, added by the key's place: counted from the first column that a KV head of a row sees, or back
    from the query's own column. P is at least the most columns that a row sees."""
    relative: bool = False
    sinks: Tensor | None = None
    """[H] float32: one score more per head in the softmax, with no value."""


PLAIN = Scores()
TYPES = (torch.float32, torch.bfloat16)
"""What it reads and gives."""


def takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel is for such tensors."""
    return device.type == "cpu" and dtype in TYPES


def serves(q: Tensor) -> bool:
    """Whether the kernel is for queries like these, and there."""
    return takes(q.device, q.dtype) and native.load() is not None


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Sequence[int],
    pads: Sequence[Sequence[int]],
    scale: float,
    scores: Scores = PLAIN,
    reach: int | None = None,
) -> Tensor:
    """The token at place w of row b attends to columns pads[b][k] .. starts[b] + w of KV head k, and of these to
    the last `reach` (None: all); no other is read.

    q [B, H, W, D], keys [B, K, C, D], values [B, K, C, E], the latter two with any strides but the innermost, which is
    1. Returns [B, H, W, E]. A row's bits do not depend on W, nor on its place in the window, nor on the batch.
    """
    window = q.shape[2]
    ends = [(start + window - 1) // BLOCK + 1 for start in starts]
    oldest = [0 if reach is None else max(start + 1 - reach, 0) for start in starts]
    lefts = [max(min(row), least) for row, least in zip(pads, oldest, strict=True)]
    blocks = max(end - left // BLOCK for end, left in zip(ends, lefts, strict=True))
    heads_pads = [pad for row in pads for pad in row]
    where = ((ctypes.c_int64 * len(starts))(*starts), (ctypes.c_int64 * len(heads_pads))(*heads_pads))
    return _attend(q, keys, values, *where, blocks, scale, scores, reach)


def attend_at(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    pads: Tensor,
    scale: float,
    scores: Scores = PLAIN,
    reach: int | None = None,
    work: list[Tensor] | None = None,
) -> Tensor:
    """As `attend`, for starts [B] and pads [B, K] (int64) that are read when the kernel runs. Calls that follow each
    other may share the memory that they `work` in: a list that the first one fills."""
    assert starts.is_contiguous() and pads.is_contiguous(), "whole numbers that lie side by side"
    return _attend(q, keys, values, starts, pads, -(-keys.shape[2] // BLOCK), scale, scores, reach, work)


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Argument,
    pads: Argument,
    blocks: int,
    scale: float,
    scores: Scores,
    reach: int | None,
    shared: list[Tensor] | None = None,
) -> Tensor:
    library = native.load()
    assert library is not None, "ask `serves` first"
    assert q.dtype is keys.dtype is values.dtype and q.dtype in TYPES, "the kernel reads float32 or bfloat16 numbers"
    assert keys.stride(-1) == values.stride(-1) == 1, "numbers of a key, and of a value, lie side by side"
    if q.stride(-1) != 1:
        q = side_by_side(q)
    batch, heads, window, size = q.shape
    strides = (*q.stride()[:3], *keys.stride()[:3], *values.stride()[:3])
    shape = Shape(batch, heads, keys.shape[1], window, size, values.shape[3], *strides)
    narrow, threads = int(q.dtype is not torch.float32), torch.get_num_threads()
    floats = library.workspace(ctypes.addressof(shape), blocks, narrow, threads)
    if shared and shared[-1].numel() >= floats:
        work = shared[-1]
    else:
        work = q.new_empty(floats, dtype=torch.float32)
        if shared is not None:
            shared.append(work)
    out = q.new_empty((batch, heads, window, values.shape[3]))
    given = (
        q,
        keys,
        values,
        starts,
        pads,
        shape,
        _score(scale, scores),
        reach or 0,
        blocks,
        work,
        out,
        narrow,
        threads,
    )
    call(library.attend, *given, held=scores)
    return out


def _score(scale: float, scores: Scores) -> Score:
    cap, bias, relative, sinks = scores
    for held in (bias, sinks):
        assert held is None or (held.dtype is torch.float32 and held.is_contiguous()), "float32, side by side"
    pointers = (None if held is None else held.data_ptr() for held in (sinks, bias))
    return Score(scale, cap or 0.0, *pointers, 0 if bias is None else bias.shape[1], relative)
