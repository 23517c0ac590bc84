"""Triton program of `write_token`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_token(
    keys, values, k, v, slots, k_batch, k_head, k_slot, v_batch, v_head, v_slot, new_k_batch, new_k_head,
    new_v_batch, new_v_head, SIZE: tl.constexpr, VALUE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """The key and value of one head of one row. Grid (K, B)."""
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place = tl.load(slots + batch).to(tl.int64)
    channel = tl.arange(0, PAD)
    key = tl.load(k + batch * new_k_batch + head * new_k_head + channel, mask=channel < SIZE)
    value = tl.load(v + batch * new_v_batch + head * new_v_head + channel, mask=channel < VALUE)
    tl.store(keys + batch * k_batch + head * k_head + place * k_slot + channel, key, mask=channel < SIZE)
    tl.store(values + batch * v_batch + head * v_head + place * v_slot + channel, value, mask=channel < VALUE)
