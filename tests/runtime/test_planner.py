"""The planner's arithmetic, on machines that are not there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vericache_compile.plan import Way, rounded
from vericache_compile.runtime.planner import Choice, Load, Machine, choices, choose, ring_bytes

GPU = Machine(device_bytes=141e9, memory_gbps=4800, link_gbps=55)
LLAMA = Load(
    weights=16e9,
    draft_weights=16e9,
    kv=131072,
    draft_kv=26214,
    held_kv=131072,
    site_kv=4096,
    context=128_000,
    batch=7,
)


def by_name(load: Load, machine: Machine, staging: float | None = None) -> dict[str, Choice]:
    return {each.name: each for each in choices(load, machine, staging)}


def test_plain_decoding_reads_weights_and_full_kv_for_every_token() -> None:
    plain = by_name(LLAMA, GPU)[Way.OFF]
    assert plain.tokens_per_second == pytest.approx(7 / ((16e9 + 7 * 128_000 * 131072) / 4.8e12))
    assert plain.tokens_per_second == pytest.approx(262, rel=0.1)


def test_resident_verify_wins_where_full_kv_fits() -> None:
    made = choices(replace(LLAMA, batch=5), GPU)
    best = choose(made)
    assert best is not None
    assert best.name == Way.RESIDENT
    assert best.tokens_per_second > 2 * made[0].tokens_per_second


def test_swapped_verify_is_bound_by_the_link() -> None:
    swapped = by_name(LLAMA, GPU)[Way.SWAPPED]
    transfer = LLAMA.full / 55e9
    assert swapped.tokens_per_second == pytest.approx(7 * 14 / transfer, rel=0.15)
    assert swapped.fits
    assert swapped.device_bytes < 50e9


def test_what_drafts_hold_does_not_come_over_the_link() -> None:
    half = by_name(replace(LLAMA, reload=0.5), GPU)[Way.SWAPPED]
    assert half.tokens_per_second == pytest.approx(7 * 14 / (0.5 * LLAMA.full / 55e9), rel=0.15)
    assert any("50% of full KV" in line for line in half.arithmetic)


def test_a_batch_that_does_not_fit_is_made_smaller() -> None:
    machine = replace(GPU, device_bytes=40e9)
    found = by_name(replace(LLAMA, batch=32), machine)
    for name in Way:
        smaller = found[f"{name}, smaller batch"]
        assert not found[name].fits
        assert smaller.fits
        assert not by_name(replace(LLAMA, batch=smaller.batch + 1), machine)[name].fits


def test_only_a_smaller_batch_of_swapped_verify_may_fit() -> None:
    best = choose(choices(replace(LLAMA, batch=32, reload=0.8), replace(GPU, device_bytes=30e9)))
    assert best is not None
    assert (best.name, best.batch) == (f"{Way.SWAPPED}, smaller batch", 3)


def test_fewer_rows_may_read_other_weights() -> None:
    load = replace(LLAMA, batch=20, draft_weights=8e9, few=(8, 4e9))
    found = by_name(load, replace(GPU, device_bytes=60e9))
    smaller = found[f"{Way.RESIDENT}, smaller batch"]
    assert "15 x (weights 4 GB" in smaller.arithmetic[0]
    assert (
        smaller.device_bytes
        == by_name(replace(load, batch=smaller.batch, draft_weights=4e9), GPU)[Way.RESIDENT].device_bytes
    )
    assert "15 x (weights 8 GB" in found[Way.RESIDENT].arithmetic[0]


def test_windows_are_held_whole_and_do_not_come_over_the_link() -> None:
    """Of 32 layers 24 read a window of 1,024 tokens."""
    window = replace(LLAMA, kv=131072 * (8 + 24 * 1024 / 128_000) / 32, sliding_kv=131072 * 24 / 32)
    assert window.full < 0.27 * LLAMA.full
    assert window.full_held == LLAMA.full_held
    swapped = by_name(window, GPU, 0)[Way.SWAPPED]
    assert swapped.staging_bytes == pytest.approx(2 * LLAMA.full_held / 32, rel=0.03), "one comes, one is put together"
    assert f"transfer = full KV {LLAMA.full / 4e9:.3g} GB" in swapped.arithmetic[2]


def test_nothing_fits() -> None:
    assert choose(choices(LLAMA, replace(GPU, device_bytes=10e9))) is None


@pytest.mark.parametrize("staging", [0.0, 1e9, 1e12])
def test_a_ring_has_a_slot_at_least_and_the_whole_cache_at_most(staging: float) -> None:
    ring = by_name(LLAMA, GPU, staging)[Way.SWAPPED].staging_bytes
    assert LLAMA.full_held / 32 <= ring <= rounded(int(LLAMA.full_held))
    assert LLAMA.full < LLAMA.full_held < 1.01 * LLAMA.full


def test_more_ring_is_never_slower() -> None:
    rates = [by_name(LLAMA, GPU, size * 1e9)[Way.SWAPPED].tokens_per_second for size in (1, 2, 4, 8, 16)]
    assert rates == sorted(rates)


def test_the_ring_is_what_comes_in_while_a_round_drafts() -> None:
    assert ring_bytes(16e9, 16, GPU) == pytest.approx(15 * 16e9 / 4800 * 55)


def test_copies_of_weights_take_memory() -> None:
    low = replace(LLAMA, draft_weights=8e9)
    assert by_name(low, GPU)[Way.RESIDENT].device_bytes == by_name(LLAMA, GPU)[Way.RESIDENT].device_bytes + 8e9


def test_every_choice_says_where_its_figures_come_from() -> None:
    for each in choices(LLAMA, GPU):
        text = "\n".join(each.arithmetic)
        assert "memory =" in text
        assert ("does not fit" in text) is not each.fits


def test_a_ring_that_pays_is_no_larger_than_what_is_left() -> None:
    """Over a fast link much of full KV could come while drafting runs."""
    fast = replace(GPU, link_gbps=450)
    ring = by_name(LLAMA, fast)[Way.SWAPPED]
    assert ring.staging_bytes > 50e9
    small = by_name(LLAMA, replace(fast, device_bytes=60e9))[Way.SWAPPED]
    assert small.fits
    assert small.device_bytes == pytest.approx(60e9)
    assert small.tokens_per_second < ring.tokens_per_second
