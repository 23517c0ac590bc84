"""`interleave` in Triton: two buffers put into the order that the mask says, to the bit, and nothing else touched."""

from __future__ import annotations

import pytest
import torch

from vericache_compile.kernels.interleave import BLOCK, count_before, interleave, interleave_reference, take

KEPT = ([40, 3, 0], [BLOCK + 1, 0, 2 * BLOCK], [BLOCK + 9] * 3)
"""Per case: tokens that are held, of each head."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(16, 16), (20, 40), (136,)])
@pytest.mark.parametrize("counts", KEPT)
def test_tokens_come_in_the_order_of_the_mask(
    counts: list[int], sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    draw = torch.Generator().manual_seed(0)
    heads, tokens = len(counts), 2 * BLOCK + 9
    slots, most = max(counts), tokens - min(counts)
    held = torch.zeros(heads, tokens, dtype=torch.bool)
    for head, count in enumerate(counts):
        held[head, torch.randperm(tokens, generator=draw)[:count]] = True
    firsts = torch.tensor([[[most - tokens + count] for count in counts], [[slots - count] for count in counts]])
    full = [torch.randn(heads, tokens, size, generator=draw).to(dtype) for size in sizes]
    kept = [torch.full((heads, slots, size), float("nan"), dtype=dtype) for size in sizes]
    left = [torch.full((heads, most, size), float("nan"), dtype=dtype) for size in sizes]
    for part, own, rest in zip(full, kept, left, strict=True):
        for head, count in enumerate(counts):
            own[head, slots - count :] = part[head, held[head]]
            rest[head, most - tokens + count :] = part[head, ~held[head]]
    kept, left = [x.to(device) for x in kept], [x.to(device) for x in left]
    held, firsts = held.to(device), firsts.to(device)
    for ours in (False, True):
        room = [torch.full((heads, tokens + 5, size), 7.0, dtype=dtype, device=device) for size in sizes]
        targets = [x[:, 2:-3] for x in room]
        if ours:
            interleave(targets, kept, left, held, count_before(held), firsts)
        else:
            interleave_reference(targets, kept, left, held, firsts)
        for target, whole, expected in zip(targets, room, full, strict=True):
            assert torch.equal(target.cpu(), expected)
            assert (whole[:, :2] == 7).all()
            assert (whole[:, -3:] == 7).all()


def test_kept_tokens_may_lie_apart(device: torch.device) -> None:
    x = torch.randn(2, 5, 16, device=device)
    target, left = torch.empty_like(x), x.new_empty(2, 0, 16)
    held = torch.ones(2, 5, dtype=torch.bool, device=device)
    apart = x.transpose(0, 1).contiguous().transpose(0, 1)
    firsts = torch.zeros(2, 2, 1, dtype=torch.int64, device=device)
    interleave([target], [apart], [left], held, count_before(held), firsts)
    assert torch.equal(target, x)


def test_held_tokens_before_each_block() -> None:
    held = torch.arange(2 * BLOCK + 1).repeat(2, 1) % torch.tensor([[2], [3]]) == 0
    expected = [[0, BLOCK // 2, BLOCK], [0, -(-BLOCK // 3), -(-2 * BLOCK // 3)]]
    assert count_before(held).tolist() == expected


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_tokens_are_taken_from_tensors_that_lie_otherwise(order: tuple[int, ...]) -> None:
    """Heads within tokens, as a model makes them, or a view of a longer cache."""
    x = torch.randn(5, 7, 12).permute(order)[:, 1:]
    chosen = torch.tensor([[0, 3], [2, 1], [1, 1], [3, 0], [0, 0], [2, 2], [3, 3]])[: x.shape[0]]
    assert torch.equal(take(x, chosen), x.take_along_dim(chosen.unsqueeze(-1), dim=1))
    assert torch.equal(take(x[..., :5], chosen), x[..., :5].take_along_dim(chosen.unsqueeze(-1), dim=1))
