"""Triton program of `interleave`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def interleave(
    to_keys, to_values, kept_keys, kept_values, left_keys, left_values, held, before, firsts, tokens, blocks, kv_heads,
    to_k_head, to_v_head, kept_k_head, kept_v_head, left_k_head, left_v_head, SIZE: tl.constexpr, VALUE: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A block of tokens of one head; of a token's numbers each pair of buffers holds SIZE and VALUE, side by side.

    Without values VALUE is 0. Grid (ceil(tokens / BLOCK), K).
    """
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    there = token < tokens
    own = tl.load(held + head * tokens + token, mask=there, other=0).to(tl.int32)
    kept = tl.load(before + head * blocks + block) + tl.cumsum(own, 0)  # held ones up to each token, itself included
    in_left = tl.load(firsts + head) + token - kept
    in_kept = tl.load(firsts + kv_heads + head) + kept - 1
    is_kept, is_left = there & (own != 0), there & (own == 0)
    move(
        to_keys + head * to_k_head, kept_keys + head * kept_k_head, left_keys + head * left_k_head, token, in_kept,
        in_left, is_kept, is_left, SIZE, CHUNK,
    )  # fmt: skip
    if VALUE:
        move(
            to_values + head * to_v_head, kept_values + head * kept_v_head, left_values + head * left_v_head, token,
            in_kept, in_left, is_kept, is_left, VALUE, CHUNK,
        )  # fmt: skip


@triton.jit
def move(to, kept, left, token, in_kept, in_left, is_kept, is_left, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Rows of SIZE numbers from one of two buffers each, CHUNK at a time: more would not fit in registers."""
    for begin in tl.static_range(0, SIZE, CHUNK):
        channel = begin + tl.arange(0, CHUNK)[None, :]
        inside = channel < SIZE
        ours = tl.load(kept + in_kept[:, None] * SIZE + channel, mask=is_kept[:, None] & inside, other=0)
        theirs = tl.load(left + in_left[:, None] * SIZE + channel, mask=is_left[:, None] & inside, other=0)
        both = tl.where(is_kept[:, None], ours, theirs)
        tl.store(to + token[:, None] * SIZE + channel, both, mask=(is_kept | is_left)[:, None] & inside)
