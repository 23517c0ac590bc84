"""Bytes per token of a method, whatever number of tokens it begins to cover at."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vericache_compile.compressors.spec import parse
from vericache_compile.estimate import compressed_bytes, measure
from vericache_compile.plan import Site

SITE = Site(0, 4, 2, 16, 16, 0.25, torch.float32, (0, 1))


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("none", 1.0),
        ("streaming(keep=0.25)", 0.25),
        ("lagkv(keep=0.25, lag=1000)", 0.25),
        ("snapkv(window=100000)", 1.0),
        ("int8", 0.3125),
        ("quest(whole=0)", 1 / 16),
    ],
)
def test_bytes_are_a_share_of_the_full_cache(text: str, share: float) -> None:
    """A method that covers nothing of any length leaves all in the exact tail."""
    assert compressed_bytes(parse(text, {}), [SITE]) == pytest.approx(share * SITE.bytes_per_token, rel=0.02)


def test_bytes_that_depend_on_the_data_are_not_those_of_zeros() -> None:
    method = parse("packkv", {})
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(SITE.kv_heads, 1024, 16, generator=generator) for _ in range(2))
    region = method.compress(keys, values, None)
    assert compressed_bytes(method, [SITE]) == pytest.approx(region.nbytes / region.covered, rel=0.05)


@pytest.mark.parametrize("text", ["packkv", "snapkv", "kivi"])
def test_a_callers_default_device_does_not_matter(text: str) -> None:
    expected = compressed_bytes(parse(text, {}), [SITE])
    with torch.device("meta"):
        assert compressed_bytes(parse(text, {}), [SITE]) == expected


def test_only_sites_of_one_shape_share() -> None:
    sites = [replace(SITE, layer=layer, value_size=size) for layer, size in enumerate((8, 16, 16, 16))]
    full = sum(site.bytes_per_token for site in sites)
    shared = compressed_bytes(parse("kvsharer(share=0.5)", {}), sites)
    assert shared == pytest.approx(full - SITE.bytes_per_token, rel=0.02), "site 3 reads site 2, site 1 nothing"


def test_a_sliding_window_is_kept_whole_and_read_no_further() -> None:
    sliding = replace(SITE, layer=1, window=100)
    method, size = parse("streaming(keep=0.25)", {}), SITE.bytes_per_token
    assert compressed_bytes(method, [SITE, sliding]) == pytest.approx(1.25 * size, rel=0.02)
    assert measure(method, [SITE, sliding]).read(1000) == (1100 * size, pytest.approx(350 * size, rel=0.02))
    assert measure(method, [sliding]).read(10) == (10 * size, 10 * size)


def test_what_drafts_hold_as_it_was_cached_is_not_brought_again() -> None:
    sliding = replace(SITE, layer=1, window=100)
    size = SITE.bytes_per_token
    for text, share in {
        "none": 0,
        "knorm(keep=0.25)": 0.75,
        "adakv(keep=0.25)": 0.75,
        "kivi": 1,
        "quest(whole=0)": 1,
    }.items():
        assert measure(parse(text, {}), [SITE, sliding]).reloaded(1000) == pytest.approx(1000 * share * size, rel=0.02)
    borrowing = parse("kvsharer(share=0.5)", {})
    alike = [replace(SITE, layer=layer) for layer in range(4)]
    assert measure(borrowing, alike).reloaded(10) == 20 * size, "layers that borrow hold nothing of their own"
    apart = [replace(SITE, layer=layer, value_size=(16, 8)[layer % 2]) for layer in range(4)]
    anew = parse("snapkv(refresh=16)", {})
    assert measure(anew, [SITE, sliding]).reloaded(10) == 10 * size, "what is soon made anew is not set apart"
    assert measure(borrowing, apart).reloaded(10) == 0, "none lends to one of another shape"
