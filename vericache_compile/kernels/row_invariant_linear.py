"""The product of a few rows with a weight: a row's bits depend on that row and the weight alone.

Libraries choose tiles and the split of the inner dimension by the number of rows. Here each number is a sum in float32
in one order, whatever the other rows are: in Triton on a GPU, over tiles of the inner dimension; in C++ on the CPU,
where bfloat16 is rounded once. That of the CPU is made for a window of a few rows: for a hundred a library that may
choose by their number is faster.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vericache_compile.kernels import native
from vericache_compile.kernels.calls import call, side_by_side
from vericache_compile.kernels.launch import on, serves

Wanted = int | ctypes.Array[ctypes.c_int64] | None
"""How many there are along the first axis of x; read from an array when the kernel runs; None: all."""


class Tiles(NamedTuple):
    """How a product is cut, by its weight alone: a batch of four windows of 16 reads a weight once."""

    rows: int
    outs: int
    width: int
    """Bytes of a row that one step takes."""
    stages: int
    """Steps in flight."""


ON_CPU = (torch.float32, torch.bfloat16)
"""What the kernel of the CPU reads and gives."""
WIDE = 8192
"""Outputs from which on tiles of 64 keep every multiprocessor busy."""


def tiles_of(outs: int, itemsize: int) -> Tiles:
    """The tiles for a weight of so many outputs; float32 has no tensor cores to fill, so fewer rows."""
    if itemsize == 4:
        return Tiles(16, 32, 256, 3)
    return Tiles(64, 64, 128, 6) if outs >= WIDE else Tiles(64, 32, 256, 4)


def row_invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] or None; for the kernel on the CPU weights lie as [out, in]. Returns
    [..., out]; along the first axis of x only the first `wanted` (None: all) need be right, see `ops.WANTED`."""
    if costs_by_row(weight):
        return _multiply_rows(x, weight, bias, wanted)
    flat = x.reshape(-1, 1, x.shape[-1])
    return _multiply(flat, weight[None], bias).view(*x.shape[:-1], weight.shape[0])


def row_invariant_by_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, H, in], each head's rows by its own weight [H, out, in] with any strides. Returns [M, H, out]."""
    return _multiply(x, weight, None)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, H, in] by weight [H, out, in], plus bias [out]."""
    from vericache_compile.kernels import row_invariant_linear_triton as programs

    if x.stride(-1) != 1:
        x = x.contiguous()
    count, (heads, outs, size) = x.shape[0], weight.shape
    out = torch.empty((count, heads, outs), dtype=x.dtype, device=x.device)
    tiles = tiles_of(outs, x.element_size())
    with on(x):
        programs.multiply[(-(-count // tiles.rows), -(-outs // tiles.outs), heads)](
            x, weight, weight if bias is None else bias, out, count, *x.stride()[:2], *weight.stride(),
            HEADS=heads, IN=size, OUT=outs, BIAS=bias is not None, ROWS=tiles.rows, OUTS=tiles.outs,
            INS=tiles.width // x.element_size(), num_warps=4, num_stages=tiles.stages,
        )  # fmt: skip
    return out


def _multiply_rows(x: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted) -> Tensor:
    library = native.load()
    assert library is not None, "ask `is_row_invariant` first"
    assert x.dtype is weight.dtype and x.dtype in ON_CPU, "the kernel reads float32 or bfloat16 numbers"
    assert x.shape[-1] == weight.shape[1], f"rows of {x.shape[-1]} numbers by a weight of {weight.shape[1]}"
    if bias is not None:
        assert bias.dtype is weight.dtype, f"a bias of {bias.dtype} for a weight of {weight.dtype}"
        assert bias.shape == weight.shape[:1], f"a bias of {tuple(bias.shape)} for {weight.shape[0]} outputs"
        bias = side_by_side(bias)
    x = side_by_side(x)
    outs, size = weight.shape
    out = x.new_empty((*x.shape[:-1], outs))
    if not (total := x.shape[:-1].numel()):
        return out
    told = (ctypes.c_int64 * 1)(wanted) if isinstance(wanted, int) else wanted
    narrow = x.dtype is not torch.float32
    work = x.new_empty(x.numel(), dtype=torch.float32) if narrow else None
    numbers = (told, total, total // max(x.shape[0], 1), size, outs)
    call(library.multiply_rows, x, weight, bias, *numbers, out, int(narrow), work, torch.get_num_threads())
    return out


def is_row_invariant(weight: Tensor) -> bool:
    """Whether a kernel is for such a weight, and there."""
    return (weight.dim() in (2, 3) and serves(weight)) or costs_by_row(weight)


def costs_by_row(weight: Tensor) -> bool:
    """Whether the kernel is that of the CPU, to which a row less is work less; tiles on a GPU are filled anyway."""
    fits = weight.dim() == 2 and weight.is_contiguous() and not serves(weight)
    if not fits or weight.device.type != "cpu" or native.load() is None:
        return False
    return weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and not multiplies_bfloat16())


@cache
def multiplies_bfloat16() -> bool:
    """Whether oneDNN does on this CPU: with the instructions for it, many rows take a fraction of the kernel's time."""
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def row_invariant_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same in float32, rounded once at the end."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
