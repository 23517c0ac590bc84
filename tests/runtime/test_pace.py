"""Drafting is turned off while it does not pay, and tried again."""

from __future__ import annotations

from vericache_compile.runtime.pace import REST, ROUNDS, TRIES, Pace, Seen


def rounds(pace: Pace, kept: float, draft_seconds: float, count: int = ROUNDS) -> None:
    for _ in range(count):
        pace.note(Seen(15, kept, draft_seconds, 1.0))


def test_a_sequence_that_keeps_what_is_drafted_drafts_on() -> None:
    pace = Pace()
    rounds(pace, kept=14, draft_seconds=8.0, count=100)
    assert not pace.resting


def test_drafts_that_are_never_right_are_left_out_after_a_few_rounds() -> None:
    pace = Pace()
    rounds(pace, kept=1, draft_seconds=3.0, count=ROUNDS - 1)
    assert not pace.resting
    rounds(pace, kept=1, draft_seconds=3.0, count=1)
    assert pace.resting == REST


def test_it_is_tried_again() -> None:
    pace = Pace()
    rounds(pace, kept=1, draft_seconds=3.0)
    for left in range(REST, 0, -1):
        assert pace.resting == left
        pace.note(Seen(0, 1, 0.0, 1.0))
    assert pace.resting == 0
    rounds(pace, kept=14, draft_seconds=3.0)
    assert not pace.resting


def alone(pace: Pace, seconds: float) -> None:
    while pace.resting:
        pace.note(Seen(0, 1, 0.0, seconds))


def test_a_little_slower_is_no_reason() -> None:
    """Within five per cent, drafting stays on."""
    pace = Pace()
    rounds(pace, kept=4, draft_seconds=3.1)
    alone(pace, 1.0)
    rounds(pace, kept=4, draft_seconds=3.1, count=100)
    assert not pace.resting
    rounds(pace, kept=4, draft_seconds=3.4)
    assert pace.resting > TRIES


def test_where_it_is_close_verifying_alone_is_tried() -> None:
    """Once: it may take less than verifying a window, and drafting is held against what it takes."""
    for seconds, pays in ((1.0, True), (0.9, False)):
        pace = Pace()
        rounds(pace, kept=4, draft_seconds=2.8)
        assert pace.resting == TRIES
        alone(pace, seconds)
        rounds(pace, kept=4, draft_seconds=2.8, count=1)
        assert bool(pace.resting) is not pays
    pace = Pace()
    rounds(pace, kept=8, draft_seconds=2.8)
    assert not pace.resting, "more than twice as fast"


def test_one_slow_verify_pass_does_not_count() -> None:
    """Verifying alone is judged by its fastest pass: what another program took is no merit of drafting."""
    pace = Pace()
    for seconds in (1.0, *[5.0] * (ROUNDS - 1)):
        pace.note(Seen(15, 1.0, 0.5, seconds))
    assert pace.resting


def test_a_transfer_that_drafting_hides_is_part_of_what_verifying_alone_would_take() -> None:
    """Else drafts that keep the link busy would look slower than the verify passes whose wait they take away."""
    pace = Pace()
    for _ in range(ROUNDS):
        pace.note(Seen(15, 10.0, 3.0, 0.1, 3.0))
    assert not pace.resting
    for _ in range(ROUNDS):
        pace.note(Seen(15, 1.0, 3.0, 0.1, 2.0))
    assert pace.resting


def test_rounds_that_compile_and_record_do_not_count() -> None:
    """Kernels are compiled in the first round, recorded in the second: seconds that no later round takes."""
    pace = Pace()
    for seconds in (60.0, 20.0, *[3.0] * (ROUNDS - 2)):
        pace.note(Seen(15, 8.0, seconds, 1.0))
    assert not pace.resting


def test_what_comes_while_a_round_drafts_is_known_after_a_few() -> None:
    """Rounds without transfers say nothing, nor do the first two, in which kernels are compiled and recorded."""
    pace = Pace()
    for drafting in (60.0, 20.0, 2.0, 2.0):
        pace.note(Seen(15, 8.0, drafting, 1.0, 0.5, 1000))
        pace.note(Seen(0, 8.0, drafting, 1.0))
        assert pace.bytes_while_drafting() == 0
    pace.note(Seen(15, 8.0, 3.0, 1.0, 0.5, 1000))
    assert pace.bytes_while_drafting() == 6000
