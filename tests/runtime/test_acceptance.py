"""Which rows stand, and how many tokens the next round drafts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vericache_compile.runtime.acceptance import accept, next_horizon

TOKENS = st.integers(0, 3)
"""Few tokens, so that chance alone makes long runs."""
PAIRS = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("window", "predicted", "kept"),
    [
        ([7], [3], 1),
        ([7, 3], [3, 5], 2),
        ([7, 4], [3, 5], 1),
        ([7, 3, 5, 1], [3, 5, 2, 9], 3),
        ([7, 4, 5, 2], [3, 5, 2, 9], 1),
        ([7, 3, 5, 2], [3, 5, 2, 9], 4),
    ],
)
def test_rows_stand_up_to_the_first_token_that_was_not_predicted(
    window: list[int], predicted: list[int], kept: int
) -> None:
    assert accept(window, predicted, forced=False) == kept


def test_a_short_draft_has_fewer_rows_than_verify() -> None:
    """Verify always gives W rows; those of the padding are never looked at."""
    assert accept([7, 3], [3, 5, 5, 5, 5, 5, 5, 5], forced=False) == 2


@given(pairs=PAIRS, more=st.lists(TOKENS, max_size=3))
def test_what_stands_is_the_longest_greedy_run(pairs: list[tuple[int, int]], more: list[int]) -> None:
    window, predicted = [w for w, _ in pairs], [p for _, p in pairs] + more
    kept = accept(window, predicted, forced=False)
    assert 1 <= kept <= len(window)
    assert window[1:kept] == predicted[: kept - 1]
    assert kept == len(window) or window[kept] != predicted[kept - 1]


@given(pairs=PAIRS)
def test_all_forced_rows_stand(pairs: list[tuple[int, int]]) -> None:
    assert accept([w for w, _ in pairs], [p for _, p in pairs], forced=True) == len(pairs)


@given(served=st.integers(0, 300), horizon=st.integers(1, 255), longest=st.integers(1, 255))
def test_a_horizon_is_at_least_one_and_at_most_the_longest(served: int, horizon: int, longest: int) -> None:
    assert 1 <= next_horizon(served, horizon, longest) <= longest


@given(horizon=st.integers(1, 255), longest=st.integers(1, 255))
def test_a_caller_that_takes_every_row_gets_more(horizon: int, longest: int) -> None:
    assert next_horizon(horizon + 1, horizon, longest) == min(2 * horizon, longest)


@given(served=st.integers(2, 255), horizon=st.integers(2, 255))
def test_a_caller_that_leaves_early_gets_twice_what_it_took(served: int, horizon: int) -> None:
    assert next_horizon(min(served, horizon), horizon, 255) == min(2 * min(served, horizon), 255)


@given(horizon=st.integers(1, 255), longest=st.integers(1, 255))
def test_a_caller_that_takes_nothing_that_was_drafted_gets_one(horizon: int, longest: int) -> None:
    """It took the round's first row, which nobody drafted."""
    assert next_horizon(1, horizon, longest) == 1


def test_a_greedy_caller_is_back_at_full_length_in_a_few_rounds() -> None:
    horizons = [1]
    while horizons[-1] < 15:
        horizons.append(next_horizon(horizons[-1] + 1, horizons[-1], 15))
    assert horizons == [1, 2, 4, 8, 15]
