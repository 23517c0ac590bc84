"""FlexAttention is a site where it leaves scores as they are and a token sees all that is cached, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import Toy, calls_of, run_until, run_variant, take_steps, toy_decode
from models import Switch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from vericache_compile import stats
from vericache_compile.errors import UnsupportedGraph


def causal(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return column <= row


class Flexible(Toy):
    """Attends by FlexAttention; a token sees all that is cached, a prompt what is before it."""

    size = 16

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        return flex_attention(q, k, v, block_mask=more[0] if more else None, enable_gqa=True)


class Capped(Flexible):
    """Changes its scores."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        return flex_attention(q, k, v, score_mod=lambda score, *_: score.tanh(), enable_gqa=True)


class Measured(Flexible):
    """Reads the logarithm of the sums as well."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        out, sums = flex_attention(q, k, v, enable_gqa=True, return_lse=True)
        return out * sums[..., None]


@pytest.mark.parametrize("batch", [1, 3])
def test_verify_over_a_window_gives_what_the_captured_step_gives(batch: int) -> None:
    captured = toy_decode(Flexible(), batch=batch)
    program = run_until(captured, "expand_window", batch=batch)
    steps = take_steps(program, captured, 4)
    [logits] = run_variant(program, "verify", captured, steps, 4)
    torch.testing.assert_close(logits, torch.stack([rows[0] for rows in steps.rows]))


def test_nothing_of_a_block_mask_stays_in_a_variant() -> None:
    program = run_until(toy_decode(Flexible()), "split_modes")
    for variant in program.variants.values():
        assert not [name for name in calls_of(variant) if "vmap" in name or name in ("setitem", "argsort")]


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (Capped, "with a score_mod"),
        (Measured, "whose sums of weights are used"),
        (Flexible, "of one token under a block mask"),
    ],
)
def test_other_calls_are_refused(model: type[Flexible], found: str) -> None:
    masks = () if model is not Flexible else (create_block_mask(causal, None, None, 1, 7, device="cpu"),)
    with pytest.raises(UnsupportedGraph, match=found):
        run_until(toy_decode(model(), *masks), "split_modes")


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """Greedy logits [count, B, V] after a prompt [B, T] under a causal block mask."""
    k, v = (torch.zeros(ids.shape[0], Flexible.kv_heads, 0, Flexible.size) for _ in range(2))
    mask, rows = [create_block_mask(causal, None, None, ids.shape[1], ids.shape[1], device="cpu")], []
    for _ in range(count):
        logits, k, v = model(ids, k, v, *mask)
        rows.append(logits[:, -1])
        mask, ids = [], rows[-1].argmax(-1, keepdim=True)
    return torch.stack(rows)


def test_a_loop_of_ones_own_gets_plain_tokens_and_rows_equal_to_the_bit() -> None:
    ids = torch.randint(29, (3, 40), generator=torch.Generator().manual_seed(4))
    model, switch, made = Flexible(), Switch(), []
    model.compile(backend=switch)
    for compressor in ("none", "snapkv", "streaming"):
        switch.options = {"inductor": False, "window": 8, "compressor": compressor, "strict": True}
        made.append(logits_of(model, ids, 30))
    assert torch.equal(made[0].argmax(-1), logits_of(Flexible(), ids, 30).argmax(-1))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    assert stats(model)["rounds"] > 0
