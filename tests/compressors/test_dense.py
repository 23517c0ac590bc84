"""Whole-token regions: they own their bytes, and move into a buffer without a second copy."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vericache_compile.compressors.dense import budget, check_count, check_keep
from vericache_compile.compressors.none import UncompressedKV
from vericache_compile.errors import OptionError


def region(slots: int = 5) -> UncompressedKV:
    return UncompressedKV(torch.randn(2, slots, 4), torch.randn(2, slots, 6), covered=slots)


def test_materialize_hands_out_the_stored_tensors_without_a_copy() -> None:
    held = region()
    keys, values = held.materialize()
    assert keys is held.keys
    assert values is held.values


def test_a_view_of_a_larger_cache_is_refused() -> None:
    cache = torch.randn(2, 9, 4)
    with pytest.raises(AssertionError, match="keys must be an owned copy"):
        UncompressedKV(cache[:, :5], torch.randn(2, 5, 6), covered=5)
    with pytest.raises(AssertionError, match="values must be an owned copy"):
        UncompressedKV(torch.randn(2, 5, 4), cache[:, :5], covered=5)


def test_keys_and_values_with_different_slots_are_refused() -> None:
    with pytest.raises(AssertionError, match="agree"):
        UncompressedKV(torch.randn(2, 5, 4), torch.randn(2, 6, 4), covered=5)


def test_move_to_keeps_the_numbers_and_lives_in_the_buffer() -> None:
    held = region()
    keys, values, nbytes = held.keys.clone(), held.values.clone(), held.nbytes
    keys_buffer, values_buffer = torch.zeros(2, 12, 4), torch.zeros(2, 12, 6)

    held.move_to(keys_buffer[:, 2:7], values_buffer[:, 2:7])

    assert held.keys.untyped_storage().data_ptr() == keys_buffer.untyped_storage().data_ptr()
    assert held.values.untyped_storage().data_ptr() == values_buffer.untyped_storage().data_ptr()
    assert torch.equal(keys_buffer[:, 2:7], keys)
    assert torch.equal(values_buffer[:, 2:7], values)
    assert not keys_buffer[:, 7:].any()
    assert (held.slots, held.covered, held.nbytes) == (5, 5, nbytes)


def test_extending_a_moved_region_leaves_the_buffer_alone() -> None:
    held = region()
    buffer = torch.zeros(2, 12, 4), torch.zeros(2, 12, 6)
    held.move_to(buffer[0][:, :5], buffer[1][:, :5])
    before = buffer[0].clone(), buffer[1].clone()

    longer = held.extend(torch.ones(2, 3, 4), torch.ones(2, 3, 6), None)

    assert torch.equal(buffer[0], before[0])
    assert torch.equal(buffer[1], before[1])
    assert longer.keys.untyped_storage().nbytes() == 2 * 8 * 4 * 4


def test_move_to_refuses_views_of_another_shape() -> None:
    with pytest.raises(AssertionError, match="keys are"):
        region().move_to(torch.zeros(2, 6, 4), torch.zeros(2, 5, 6))
    with pytest.raises(AssertionError, match="values are"):
        region().move_to(torch.zeros(2, 5, 4), torch.zeros(2, 6, 6))


@settings(deadline=None)
@example(70, 100)  # 7.000000000000001 in binary
@given(st.integers(1, 1000), st.integers(0, 1_000_000))
def test_the_budget_is_the_exact_fraction_rounded_up(thousandths: int, tokens: int) -> None:
    exact = ceil(Fraction(thousandths, 1000) * tokens)
    assert budget(thousandths / 1000, tokens) == exact


@settings(deadline=None)
@given(st.floats(1e-9, 1.0), st.integers(0, 100_000), st.integers(0, 1000))
def test_the_budget_grows_by_at_most_the_new_tokens(keep: float, tokens: int, more: int) -> None:
    assert min(tokens, 1) <= budget(keep, tokens) <= tokens
    assert budget(keep, tokens) <= budget(keep, tokens + more) <= budget(keep, tokens) + more


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, float("nan"), float("inf"), "0.2", None])
def test_keep_outside_its_range_is_an_option_error(keep: object) -> None:
    with pytest.raises(OptionError, match="snapkv"):
        check_keep(keep, "snapkv")  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [1e-6, 0.2, 1, 1.0])
def test_keep_within_its_range_is_taken(keep: float) -> None:
    check_keep(keep, "snapkv")


@pytest.mark.parametrize("count", [0, -1, 2.5, "3"])
def test_a_count_that_is_too_low_or_no_whole_number_is_an_option_error(count: object) -> None:
    with pytest.raises(OptionError, match="window"):
        check_count("window", count, 1, "snapkv")  # type: ignore[arg-type]
