"""Drafting is turned off while it does not pay, and tried again."""

from __future__ import annotations

import pytest

from vericache_compile.runtime.acceptance import next_horizon
from vericache_compile.runtime.pace import AGAIN, LONGEST_REST, REST, ROUNDS, TRIES, WARY, WRONG, Pace, Seen


def rounds(pace: Pace, took: float, draft_seconds: float, count: int = ROUNDS, compress_seconds: float = 0.0) -> None:
    for _ in range(count):
        pace.note(Seen(15, draft_seconds, 1.0, compress_seconds))
        pace.count(took)


def alone(pace: Pace, seconds: float) -> None:
    while pace.resting:
        pace.note(Seen(0, 0.0, seconds))
        pace.count(1)


def test_a_sequence_that_keeps_what_is_drafted_drafts_on() -> None:
    pace = Pace()
    rounds(pace, took=14, draft_seconds=8.0, count=100)
    assert not pace.resting


def test_drafts_that_are_never_right_are_left_out_after_a_few_rounds() -> None:
    pace = Pace()
    rounds(pace, took=1, draft_seconds=3.0, count=WRONG - 1)
    assert not pace.resting
    rounds(pace, took=1, draft_seconds=3.0, count=1)
    assert pace.resting == REST


def test_drafts_that_gain_too_little_are_left_out_after_some_more() -> None:
    pace = Pace()
    rounds(pace, took=2, draft_seconds=3.0, count=ROUNDS - 1)
    assert not pace.resting
    rounds(pace, took=2, draft_seconds=3.0, count=1)
    assert pace.resting == REST


def test_it_is_tried_again_and_less_often_each_time_that_it_fails() -> None:
    pace = Pace()
    for rest in (REST, 2 * REST, 4 * REST, 8 * REST, LONGEST_REST, LONGEST_REST):
        rounds(pace, took=1, draft_seconds=3.0, count=WARY if pace.failed else WRONG)
        for left in range(rest, 0, -1):
            assert pace.resting == left
            pace.note(Seen(0, 0.0, 1.0))
            pace.count(1)
    rounds(pace, took=14, draft_seconds=3.0)
    assert not pace.resting
    while not pace.resting:
        rounds(pace, took=1, draft_seconds=3.0, count=1)
    assert pace.resting == REST, "it had paid in between"


def test_the_next_sequence_is_wary_where_drafts_gave_little() -> None:
    """Not where they were right, and slow: what else the machine did then is no reason."""
    for took, wary in ((1, True), (1.5, True), (4, False)):
        pace = Pace()
        rounds(pace, took=took, draft_seconds=8.0)
        assert pace.failed
        assert pace.is_wary is wary
    pace = Pace(wary=True)
    assert pace.is_wary
    rounds(pace, took=5, draft_seconds=1.0, count=2)
    assert not pace.is_wary, "though it has not paid for long"
    pace = Pace()
    pace.rest()
    assert not pace.is_wary, "nothing was drafted: there was no memory for it"


def test_where_drafting_did_not_pay_fewer_rounds_tell_for_the_next_sequence() -> None:
    """They say no sooner, and yes as well: then it is as any other."""
    pace = Pace()
    rounds(pace, took=8, draft_seconds=12.0)
    assert pace.resting
    for draft_seconds, rests in ((12.0, True), (3.0, False)):
        following = pace.following()
        rounds(following, took=8, draft_seconds=draft_seconds, count=AGAIN - 1)
        assert not following.resting
        assert following.following().looks == AGAIN, "it has not told yet"
        rounds(following, took=8, draft_seconds=draft_seconds, count=1)
        assert bool(following.resting) is rests
    rounds(following, took=8, draft_seconds=3.0)
    assert following.following().looks == ROUNDS


def test_a_little_slower_is_no_reason() -> None:
    """Within five per cent, drafting stays on."""
    pace = Pace()
    rounds(pace, took=4, draft_seconds=3.1)
    alone(pace, 1.0)
    rounds(pace, took=4, draft_seconds=3.1, count=100)
    assert not pace.resting
    rounds(pace, took=4, draft_seconds=3.4)
    assert pace.resting > TRIES


def test_where_it_is_close_verifying_alone_is_tried() -> None:
    """Once: it may take less than verifying a window, and drafting is held against what it takes."""
    for seconds, pays in ((1.0, True), (0.9, False)):
        pace = Pace()
        rounds(pace, took=4, draft_seconds=2.8)
        assert pace.resting == TRIES
        alone(pace, seconds)
        rounds(pace, took=4, draft_seconds=2.8, count=1)
        assert bool(pace.resting) is not pays
    pace = Pace()
    rounds(pace, took=8, draft_seconds=2.8)
    assert not pace.resting, "more than twice as fast"


def test_what_compressing_again_takes_counts() -> None:
    pace = Pace()
    rounds(pace, took=8, draft_seconds=2.8, compress_seconds=5.0)
    assert pace.resting > TRIES


def test_one_slow_verify_pass_does_not_count() -> None:
    """Verifying alone is judged by its fastest pass: what another program took is no merit of drafting."""
    pace = Pace()
    for seconds in (1.0, *[5.0] * (ROUNDS - 1)):
        pace.note(Seen(15, 0.5, seconds))
        pace.count(2)
    assert pace.resting


def test_a_transfer_that_drafting_hides_is_part_of_what_verifying_alone_would_take() -> None:
    """Else drafts that keep the link busy would look slower than the verify passes whose wait they take away."""
    for took, rests in ((10, False), (1.2, True)):
        pace = Pace()
        for _ in range(ROUNDS):
            pace.note(Seen(15, 3.0, 0.1, transfer_seconds=3.0 if took > 2 else 2.0))
            pace.count(took)
        assert bool(pace.resting) is rests


def test_rounds_that_compile_and_record_do_not_count() -> None:
    """Kernels are compiled in the first round, recorded in the second: seconds that no later round takes."""
    pace = Pace()
    for seconds in (60.0, 20.0, *[3.0] * (ROUNDS - 2)):
        pace.note(Seen(15, seconds, 1.0))
        pace.count(8)
    assert not pace.resting


@pytest.mark.parametrize("wary", [False, True])
@pytest.mark.parametrize(("step", "cold", "warm"), [(0.15, 0.0445, 0.00703), (0.8, 0.2375, 0.0375)])
def test_drafting_in_vain_costs_little_and_ever_less(step: float, cold: float, warm: float, wary: bool) -> None:
    """A caller that takes a row of each round, a thousand of them; a draft step takes `step` of a verify pass."""
    pace, horizon, spent = Pace(wary=wary), 0, list[float]()
    for _ in range(1000):
        pace.count(1)
        longest = 0 if pace.resting else 15
        first = min(longest, 1) if pace.failed else longest
        horizon = next_horizon(1, horizon, longest) if horizon else first
        pace.note(Seen(horizon, step * horizon, 1.0))
        spent.append(step * horizon)
    assert sum(spent[:64]) / 64 == pytest.approx(warm if wary else cold, rel=0.01)
    assert sum(spent) / 1000 <= (0.01 if wary else 0.025)
    assert sum(spent[500:]) / 500 <= 0.005


def test_what_comes_while_a_round_drafts_is_known_after_a_few() -> None:
    """Rounds without transfers say nothing, nor do the first two, in which kernels are compiled and recorded."""
    pace = Pace()
    for drafting in (60.0, 20.0, 2.0, 2.0):
        for seen in (Seen(15, drafting, 1.0, 0.0, 0.5, 1000), Seen(0, drafting, 1.0)):
            pace.note(seen)
            pace.count(8)
        assert pace.bytes_while_drafting() == 0
    pace.note(Seen(15, 3.0, 1.0, 0.0, 0.5, 1000))
    pace.count(8)
    assert pace.bytes_while_drafting() == 6000
