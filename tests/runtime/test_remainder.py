"""What a region leaves out is set apart, and put together with it gives full KV again, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.base import CompressedKV
from vericache_compile.compressors.spec import parse
from vericache_compile.plan import Site
from vericache_compile.runtime.remainder import Remainder, carry_over, find_held, set_apart
from vericache_compile.runtime.transfers import Link
from vericache_compile.testing import random_row

Row = tuple[Tensor, Tensor, Tensor]
DROPPING = ("streaming(keep=0.3)", "snapkv(keep=0.3, window=4)", "adakv(keep=0.3, window=4)")
BEGIN, TOKENS = 5, 200


def apart_from(
    method: str, row: Row, dtype: torch.dtype = torch.float32, *, latent: bool = False
) -> tuple[CompressedKV, Remainder | None]:
    keys, values, queries = (x.to(dtype) for x in row)
    site = Site(0, 4, 2, keys.shape[2], values.shape[2], 0.25, dtype, (0, 1), latent=latent)
    region = parse(method, {}).compress(keys, values, queries)
    return region, set_apart(site, keys, values, region, BEGIN, Link())


def assembled(made: Remainder, region: CompressedKV, *sizes: int) -> list[Tensor]:
    """Targets full of NaN, and then what comes over the link, and the region."""
    dtype = made.sides[0].dtype
    came, targets = (
        [torch.full((2, columns, size), float("nan"), dtype=dtype) for size in sizes]
        for columns in (made.most, made.end - made.begin)
    )
    copied = sum(made.copy_to(Link(), *came))
    assert copied == sum(side.nbytes for side in made.sides)
    made.put_in_order(targets, came, region)
    return targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", DROPPING)
def test_both_parts_together_are_full_kv(method: str, dtype: torch.dtype) -> None:
    row = random_row(TOKENS)
    region, made = apart_from(method, row, dtype)
    assert made is not None
    assert bool(made.sure)
    assert made.end == BEGIN + region.covered
    assert sum(made.counts) == 2 * region.covered - sum(region.head_slots or (region.slots,) * 2)
    for got, full in zip(assembled(made, region, 16, 12), row, strict=False):
        assert torch.equal(got, full[:, : region.covered].to(dtype))


def test_what_joins_a_region_later_leaves_its_remainder_as_it_was() -> None:
    keys, values, _ = row = random_row(TOKENS)
    more = random_row(60, seed=1)
    for method in ("snapkv(keep=0.3, window=4)", "adakv(keep=0.3, window=4)"):
        region, made = apart_from(method, row)
        longer = region.extend(*more)
        carried = carry_over(made, region, longer)
        assert carried is not None
        assert bool(carried.sure)
        for got, full in zip(assembled(carried, longer, 16, 12), (keys, values), strict=True):
            assert torch.equal(got, full[:, : region.covered])
    region, made = apart_from("streaming(keep=0.3)", row)
    assert made is not None
    carried = carry_over(made, region, region.extend(*more))
    assert carried is None or not carried.sure, "it lets go of tokens when others join"


def test_a_region_of_other_numbers_is_found_out() -> None:
    """One bit, two tokens in each other's place, the same token twice: each is enough."""
    keys, values, _ = random_row(TOKENS)
    own = torch.arange(0, TOKENS, 3)
    flipped = values[:, own].clone()
    flipped.view(torch.int32)[1, 7, 3] ^= 1
    swapped = own.clone()
    swapped[[4, 5]] = swapped[[5, 4]]
    doubled = own.clone()
    doubled[5] = doubled[4]
    slots = (len(own),) * 2
    held, sure = find_held(keys, values, keys[:, own], values[:, own], slots)
    assert bool(sure)
    assert torch.equal(held, torch.isin(torch.arange(TOKENS), own).expand(2, -1))
    assert not find_held(keys, values, keys[:, own], flipped, slots)[1]
    for other in (swapped, doubled):
        assert not find_held(keys, values, keys[:, other], values[:, other], slots)[1]


def test_tokens_that_are_alike_come_whole_where_both_are_kept() -> None:
    """Without positions in keys a text that repeats itself has many tokens with the same key and value."""
    keys, values, _ = random_row(TOKENS)
    keys[:, 40], values[:, 40] = keys[:, 20], values[:, 20]
    for own, certain in (([3, 20, 30, 40, 50], False), ([3, 20, 30, 50], True)):
        held, sure = find_held(keys, values, keys[:, own], values[:, own], (len(own),) * 2)
        assert bool(sure) == certain
        if certain:
            assert held[0].nonzero().flatten().tolist() == own


def test_a_region_that_keeps_everything_is_put_in_place_by_itself() -> None:
    row = random_row(TOKENS)
    region, made = apart_from("adakv(keep=1.0, window=4)", row)
    assert made is not None
    assert made.counts == (0, 0)
    assert made.nbytes == 0
    assert torch.equal(assembled(made, region, 16, 12)[0], row[0][:, : region.covered])


def test_regions_of_other_things_leave_nothing_apart() -> None:
    for method in ("kivi", "snapkv | kivi", "none", "quest"):
        assert apart_from(method, random_row(TOKENS))[1] is None, method


def test_a_latent_is_kept_once() -> None:
    keys, _, queries = random_row(TOKENS)
    region, made = apart_from("snapkv(keep=0.3, window=4)", (keys, keys[..., :12], queries), latent=True)
    assert made is not None
    assert len(made.sides) == 1
    assert torch.equal(assembled(made, region, 16)[0], keys[:, : region.covered])
