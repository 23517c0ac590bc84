"""Triton program of `row_invariant_linear`: tiles of one shape, the inner dimension in one order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(
    x, weight, bias, out, rows, x_row, x_head, w_head, w_row, w_column, HEADS: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    """out[m, h, n] = sum over i of x[m, h, i] * weight[h, n, i], plus bias[n]. Grid (tiles of rows, tiles of outputs,
    heads): the tiles that read one part of the weight run side by side."""
    h = tl.program_id(2).to(tl.int64)
    x += h * x_head
    weight += h * w_head
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = (tl.program_id(1) * OUTS + tl.arange(0, OUTS)).to(tl.int64)
    total = tl.zeros([ROWS, OUTS], tl.float32)
    for begin in range(0, IN, INS):
        i = begin + tl.arange(0, INS)
        left = tl.load(
            x + m.to(tl.int64)[:, None] * x_row + i[None, :], mask=(m < rows)[:, None] & (i < IN)[None, :], other=0.0
        )
        right = tl.load(
            weight + n[None, :] * w_row + i[:, None] * w_column, mask=(n < OUT)[None, :] & (i < IN)[:, None], other=0.0
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + n, mask=n < OUT, other=0.0).to(tl.float32)[None, :]
    at = out + (m.to(tl.int64)[:, None] * HEADS + h) * OUT + n[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < OUT)[None, :])
