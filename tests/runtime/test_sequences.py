"""Sequences: what a row makes of the tokens it is fed, and how a cache, its crops and its copies find theirs again."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vericache_compile.errors import GhostError
from vericache_compile.plan import Site
from vericache_compile.runtime.caches import FullKV
from vericache_compile.runtime.sequence_table import SequenceTable
from vericache_compile.runtime.sequences import Held, Queries, Row, Sequence, followed

CPU = torch.device("cpu")
AHEAD = 3
"""Verified columns that a step holds beyond what it hands out."""
Sites = Callable[..., list[Site]]
Fill = Callable[..., None]


def make_row(length: int = 10, predicted: int | None = 5, held: tuple[int, ...] = ()) -> Row:
    """A row whose last `held` columns are verified but not handed out yet."""
    columns = range(length - len(held), length)
    rows = deque(Held(column, token, (), i) for i, (column, token) in enumerate(zip(columns, held, strict=True)))
    return Row(length=length, token=predicted, held=rows)


@dataclass
class Cache:
    """A caller's cache: ghosts only."""

    past: list[Tensor]

    @property
    def columns(self) -> int:
        return int(self.past[0].shape[2])

    def cropped(self, columns: int) -> Cache:
        return Cache([ghost[:, :, :columns] for ghost in self.past])

    def changed(self, change: Callable[[Tensor], Tensor]) -> Cache:
        return Cache([change(ghost) for ghost in self.past])


@dataclass
class World:
    """A table, and what a session does to it."""

    sites: list[Site]
    fill: Fill
    table: SequenceTable = field(default_factory=SequenceTable)
    runs: int = 0

    def prefill(self, columns: int = 10, batch: int = 2) -> Cache:
        sequence = self.table.create(self.sites, batch)
        return self._compute(sequence, 0, columns)

    def step(self, cache: Cache) -> Cache:
        """One decode call: the caller's next cache."""
        return self._compute(self.find(cache), cache.columns, cache.columns + 1)

    def find(self, cache: Cache) -> Sequence:
        found = self.table.find(cache.past)
        assert found is not None
        sequence, columns = found
        assert columns == cache.columns
        return sequence

    def _compute(self, sequence: Sequence, begin: int, end: int) -> Cache:
        self.runs += 1
        self.fill(sequence.full, begin, end + AHEAD, seed=self.runs)
        for row in sequence.rows:
            row.length = end + AHEAD
        return Cache([ghost for pair in self.table.mint(sequence, end, CPU) for ghost in pair])


@pytest.fixture
def world(make_sites: Sites, fill: Fill) -> World:
    return World(make_sites(3), fill)


def held_bytes(sequence: Sequence, columns: int) -> list[Tensor]:
    return [x[:, :, :columns].clone() for x in (*sequence.full.keys, *sequence.full.values)]


def refused(error: pytest.ExceptionInfo[GhostError]) -> GhostError:
    """The error, after a look at its three parts."""
    found = error.value
    assert found.found and found.where and found.fix
    assert str(found) == f"{found.found}\n  where: {found.where}\n  fix: {found.fix}"
    assert "run the prompt again" in found.fix
    return found


# What a row makes of a token


def test_the_expected_token_keeps_what_is_held() -> None:
    row = make_row(held=(7, 8, 9))
    row.feed(7, 7, 0, 0)
    assert [held.token for held in row.held] == [7, 8, 9]
    assert (row.length, row.token, row.surprise, row.forced) == (10, 5, None, False)


def test_rows_that_were_handed_out_are_dropped() -> None:
    row = make_row(held=(7, 8, 9))
    row.feed(9, 9, 0, 0)
    assert [held.column for held in row.held] == [9]
    row.feed(10, 5, 0, 0)
    assert not row.held
    assert (row.length, row.token) == (10, 5), "the token that the last row predicts starts the next round"


def test_another_token_drops_what_is_held() -> None:
    row = make_row(held=(7, 8, 9))
    row.feed(8, 1, 0, 0)
    assert not row.held
    assert (row.length, row.token, row.surprise, row.forced) == (8, 1, 1, False)


def test_another_token_than_the_predicted_one_changes_no_history() -> None:
    row = make_row()
    row.feed(10, 1, 0, 0)
    assert (row.length, row.token, row.surprise) == (10, 1, 1)


def test_a_first_token_is_no_surprise() -> None:
    row = make_row(predicted=None)
    row.feed(10, 1, 0, 0)
    assert (row.length, row.token, row.surprise, row.forced) == (10, 1, None, False)
    row.feed(10, 1, 0, 0)
    assert not row.forced, "the same call again expects the token that it was given"


def test_the_same_surprise_twice_is_forced() -> None:
    """A row that has ended is fed padding, whatever is predicted."""
    row = make_row()
    row.feed(10, 0, 0, 0)
    assert not row.forced
    row.length, row.token = 11, 5
    row.feed(11, 0, 0, 0)
    assert row.forced
    assert (row.length, row.token) == (11, 0)


def test_a_forced_row_stays_forced_while_it_is_fed_the_same() -> None:
    row = make_row(predicted=0, held=(0, 0, 0))
    row.forced, row.surprise = True, 0
    for column in (7, 8, 9, 10):
        row.feed(column, 0, 0, 0)
        assert row.forced
    assert row.token == 0


def test_a_forced_row_that_is_fed_another_token_is_free_again() -> None:
    row = make_row(predicted=0, held=(0, 0, 0))
    row.forced, row.surprise = True, 0
    row.feed(8, 3, 0, 0)
    assert (row.forced, row.surprise, row.length, row.token) == (False, 3, 8, 3)


def test_an_expected_token_ends_the_chance_of_being_forced() -> None:
    row = make_row(held=(7, 8, 9))
    row.surprise = 0
    row.feed(7, 7, 0, 0)
    assert row.surprise is None


@pytest.mark.parametrize(("offset", "pad"), [(-2, 0), (0, 2), (-2, 2)])
def test_other_positions_or_padding_drop_what_is_held(offset: int, pad: int) -> None:
    """The held rows were computed for another history."""
    row = make_row(held=(7, 8, 9))
    row.feed(7, 7, offset, pad)
    assert not row.held
    assert (row.length, row.token, row.offset, row.pad) == (7, 7, offset, pad)


def test_a_token_before_what_is_held_drops_it() -> None:
    row = make_row(held=(7, 8, 9))
    row.feed(4, 7, 0, 0)
    assert not row.held
    assert (row.length, row.token, row.surprise) == (4, 7, None)


@given(
    held=st.lists(st.integers(0, 2), max_size=4),
    predicted=st.none() | st.integers(0, 2),
    column=st.integers(0, 12),
    token=st.integers(0, 2),
)
def test_whatever_is_fed_the_row_stands_ready(held: list[int], predicted: int | None, column: int, token: int) -> None:
    """Afterwards either the first held row answers for this very token, or a round starts with it there."""
    row = make_row(12, predicted, tuple(held))
    row.feed(column, token, 0, 0)
    if row.held:
        assert (row.held[0].column, row.held[0].token) == (column, token)
    else:
        assert (row.length, row.token) == (column, token)


def test_truncation_only_shortens() -> None:
    row = make_row(held=(7, 8, 9))
    row.truncate(20)
    assert (row.length, row.token) == (10, None)
    assert not row.held
    row.truncate(4)
    assert row.length == 4


def query_of(*columns: int) -> Tensor:
    """Queries [1, n, 1] that say where they stand."""
    return torch.tensor(columns, dtype=torch.float32).view(1, -1, 1)


def test_queries_follow_each_other() -> None:
    held = followed(None, query_of(*range(20)), 0, 6)
    assert held.tensor.flatten().tolist() == [14, 15, 16, 17, 18, 19]
    held = followed(held, query_of(20, 21), 20, 6)
    assert held.tensor.flatten().tolist() == [16, 17, 18, 19, 20, 21]
    held = followed(held, query_of(18, 19), 18, 6)  # after a crop
    assert held.tensor.flatten().tolist() == [16, 17, 18, 19]
    held = followed(held, query_of(30, 31), 30, 6)  # those between were not seen
    assert held.tensor.flatten().tolist() == [30, 31]
    assert followed(held, query_of(*range(32, 40)), 32, 6).tensor.flatten().tolist() == [34, 35, 36, 37, 38, 39]


@given(st.integers(0, 25), st.integers(0, 25))
def test_queries_within_columns_are_those_and_end_with_the_newest(begin: int, end: int) -> None:
    held = Queries(query_of(*range(10, 20)), 20)
    found = held.within(begin, end)
    expected = list(range(max(begin, 10), end)) if end <= 20 else []
    assert ([] if found is None else found.flatten().tolist()) == expected


# How a cache finds its sequence


def test_ghosts_have_the_shape_of_the_cache(make_sites: Sites, fill: Fill) -> None:
    world = World(make_sites(2, size=32, value_size=24, dtype=torch.bfloat16), fill)
    cache = world.prefill(columns=7, batch=3)
    assert [tuple(ghost.shape) for ghost in cache.past] == [(3, 2, 7, 32), (3, 2, 7, 24)] * 2
    assert all(ghost.dtype == torch.bfloat16 and ghost.isnan().all() for ghost in cache.past)
    assert world.find(cache) is world.find(cache)


def test_a_cache_goes_on_with_its_sequence(world: World) -> None:
    cache = world.prefill()
    sequence = world.find(cache)
    for columns in range(11, 20):
        cache = world.step(cache)
        assert cache.columns == columns
        assert world.find(cache) is sequence
    assert sequence.epoch == 0
    assert len(sequence.live) == 1, "older ghosts have died"


def test_caches_of_two_prompts_do_not_mix(world: World) -> None:
    one, other = world.prefill(), world.prefill()
    first, second = world.find(one), world.find(other)
    assert first is not second
    one, other = world.step(one), world.step(other)
    assert world.find(one) is first
    assert world.find(other) is second


def test_real_data_belongs_to_no_sequence(world: World) -> None:
    world.prefill()
    assert world.table.find([torch.randn(2, 2, 10, 16) for _ in range(6)]) is None


def test_an_empty_cache_belongs_to_no_sequence(world: World) -> None:
    cache = world.prefill()
    assert world.table.find(cache.cropped(0).past) is None


def test_a_crop_cuts_the_sequence(world: World) -> None:
    cache = world.step(world.prefill())
    sequence = world.find(cache)
    for row in sequence.rows:
        row.held.append(Held(11, 1, (), 0))
        row.token = 4
    assert world.find(cache.cropped(8)) is sequence
    assert [(row.length, row.token, len(row.held)) for row in sequence.rows] == [(8, None, 0)] * 2
    assert (sequence.epoch, sequence.crops) == (1, [(1, 8)])
    cache = world.step(cache.cropped(8))
    assert cache.columns == 9
    assert world.find(cache) is sequence


def test_a_crop_beside_a_longer_live_ghost_forks(world: World) -> None:
    """A call's earlier result is still held: both states live on."""
    before = world.prefill()
    after = world.step(before)
    sequence = world.find(after)
    expected = held_bytes(sequence, 13)
    fork = world.find(before)
    assert fork is not sequence
    assert [row.length for row in fork.rows] == [10, 10]
    assert all(torch.equal(x, y[:, :, :10]) for x, y in zip(held_bytes(fork, 10), expected, strict=True))
    assert [row.length for row in sequence.rows] == [11 + AHEAD] * 2
    assert world.find(after) is sequence
    assert all(torch.equal(x, y) for x, y in zip(held_bytes(sequence, 13), expected, strict=True))


def test_a_cropped_cache_can_be_used_again(world: World) -> None:
    """The same cropped tensors in two calls: the second cuts what the first one added."""
    cropped = world.prefill().cropped(6)
    world.step(cropped)
    sequence = world.find(cropped)
    assert [row.length for row in sequence.rows] == [6, 6]


def test_a_state_from_before_a_crop_is_refused(world: World) -> None:
    """The caller kept the longer tensors; what they stood for has been overwritten."""
    cache = world.prefill()
    cropped = world.step(cache.cropped(5))
    while cropped.columns < cache.columns:
        cropped = world.step(cropped)
    with pytest.raises(GhostError, match="cropped below it") as error:
        world.find(cache)
    refused(error)
    assert [row.length for row in world.find(cropped).rows] == [10 + AHEAD] * 2


@pytest.mark.parametrize("copied", [copy.deepcopy, torch.clone, torch.Tensor.contiguous], ids=lambda f: f.__name__)
def test_a_copy_forks(world: World, copied: Callable[[Tensor], Tensor]) -> None:
    cache = world.step(world.prefill())
    sequence = world.find(cache)
    sequence.rows[1].pad, sequence.rows[1].offset = 2, -2
    fork = world.find(cache.changed(copied))
    assert fork is not sequence
    assert [(row.length, row.pad, row.offset) for row in fork.rows] == [(11, 0, 0), (11, 2, -2)]
    assert all(torch.equal(x, y) for x, y in zip(held_bytes(fork, 11), held_bytes(sequence, 11), strict=True))
    assert world.find(cache) is sequence


def test_fork_and_original_do_not_share_memory(world: World) -> None:
    cache = world.prefill()
    sequence = world.find(cache)
    before = held_bytes(sequence, 10)
    fork = world.find(cache.changed(copy.deepcopy))
    for held in (*fork.full.keys, *fork.full.values):
        held.fill_(9.0)
    assert all(torch.equal(x, y) for x, y in zip(held_bytes(sequence, 10), before, strict=True))


def test_a_shorter_copy_forks_at_its_own_length(world: World) -> None:
    cache = world.step(world.prefill())
    fork = world.find(cache.changed(copy.deepcopy).cropped(4))
    assert [row.length for row in fork.rows] == [4, 4]
    assert world.find(cache).rows[0].length == 11 + AHEAD


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda x: x.index_select(0, torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda x: x.index_select(0, torch.tensor([1, 1, 1])), [1, 1, 1]),
        (lambda x: x[torch.tensor([0, 2])], [0, 2]),
        (lambda x: x.repeat_interleave(2, dim=0), [0, 0, 1, 1, 2, 2]),
        (lambda x: torch.cat([x[1:2], x[:1]]), [1, 0]),
        (lambda x: x[:2], [0, 1]),
        (lambda x: x[1:], [1, 2]),
        (lambda x: x[:1].expand(3, -1, -1, -1), [0, 0, 0]),
    ],
    ids=["permuted", "repeated", "selected", "interleaved", "concatenated", "first rows", "last rows", "expanded"],
)
def test_rows_are_found_by_name(world: World, change: Callable[[Tensor], Tensor], rows: list[int]) -> None:
    cache = world.prefill(batch=3)
    sequence = world.find(cache)
    for b, row in enumerate(sequence.rows):
        row.pad = b
    sequence.queries[1] = [Queries(torch.full((4, 2, 16), float(b)), 7) for b in range(3)]
    fork = world.find(cache.changed(change))
    assert fork.full.batch == len(fork.rows) == len(rows)
    assert [row.pad for row in fork.rows] == rows
    for mine, theirs in zip(held_bytes(fork, 10), held_bytes(sequence, 10), strict=True):
        assert torch.equal(mine, theirs[rows])
    assert [queries and queries.tensor[0, 0, 0].item() for queries in fork.queries[1]] == rows


def test_beam_search_finds_each_reordered_cache(world: World) -> None:
    """Step, reorder, drop the old: sequences are forked and released, never piled up."""
    cache = world.prefill(batch=3)
    for i in range(6):
        cache = world.step(cache)
        expected = held_bytes(world.find(cache), cache.columns)
        order = torch.tensor([i % 3, 0, 2])
        cache = cache.changed(lambda x, order=order: x.index_select(0, order))
        found = held_bytes(world.find(cache), cache.columns)
        assert all(torch.equal(x, y[order]) for x, y in zip(found, expected, strict=True))
    assert len(world.table._by_number) <= 4


def test_copies_of_a_longer_original_stay_good_while_it_goes_on(world: World) -> None:
    cache = world.prefill()
    kept = cache.changed(copy.deepcopy)
    for _ in range(4):
        cache = world.step(cache)
    cache = world.step(cache.cropped(10))
    for _ in range(2):
        fork = world.find(kept)
        assert [row.length for row in fork.rows] == [10, 10]


def test_a_copy_of_a_cropped_original_is_refused(world: World) -> None:
    cache = world.step(world.prefill())
    kept = cache.changed(copy.deepcopy)
    cache = world.step(cache.cropped(10))
    cache = world.step(cache)
    with pytest.raises(GhostError, match="cropped below it") as error:
        world.find(kept)
    assert "uncropped while copies are in use" in refused(error).fix
    fork = world.find(kept.cropped(10))
    assert [row.length for row in fork.rows] == [10, 10], "what lies before the cut is as it was"
    assert world.find(cache.changed(copy.deepcopy)).rows[0].length == 12, "a copy made after the cut is good"


@given(crops=st.lists(st.integers(0, 12), max_size=8), epoch=st.integers(0, 8), columns=st.integers(0, 12))
def test_epochs_remember_every_cut(crops: list[int], epoch: int, columns: int) -> None:
    sequence = Sequence(1, FullKV([], 1))
    for kept in crops:
        sequence.rows[0].length = 12
        sequence.truncate(kept)
    sequence.rows[0].length = 12
    assert sequence.epoch == len(crops)
    assert sequence.still_holds(epoch, columns) == all(kept >= columns for kept in crops[epoch:])
    assert [kept for _, kept in sequence.crops] == sorted({kept for _, kept in sequence.crops})


# What is refused


def test_a_copy_that_outlives_its_sequence_is_refused(world: World) -> None:
    cache = world.prefill()
    kept = cache.changed(copy.deepcopy)
    del cache
    world.prefill()
    with pytest.raises(GhostError, match="no longer held") as error:
        world.find(kept)
    refused(error)


def test_a_copy_may_outlive_the_original_until_the_next_prompt(world: World) -> None:
    cache = world.prefill()
    kept = cache.changed(copy.deepcopy)
    del cache
    kept = world.step(kept)
    assert world.find(kept).rows[0].length == 11 + AHEAD


def test_a_ghost_of_another_table_is_refused(world: World, make_sites: Sites, fill: Fill) -> None:
    """Numbers are given out once for the whole process."""
    other = World(make_sites(3), fill)
    cache = other.prefill()
    world.prefill()
    with pytest.raises(GhostError, match="no longer held"):
        world.find(cache)


@pytest.mark.parametrize("layers", [[0], [5], [0, 1, 2, 3, 4, 5]])
def test_arithmetic_is_refused(world: World, layers: list[int]) -> None:
    cache = world.prefill()
    for place in layers:
        cache.past[place] = cache.past[place] * 1.0
    with pytest.raises(GhostError, match="NaN where cached keys or values should be") as error:
        world.find(cache)
    assert "arithmetic" in refused(error).fix


def test_a_cast_is_refused(world: World) -> None:
    with pytest.raises(GhostError, match="NaN where cached keys or values should be") as error:
        world.find(world.prefill().changed(lambda x: x.bfloat16()))
    assert "cast to another type" in refused(error).fix


def test_one_layer_of_data_among_ghosts_is_refused(world: World) -> None:
    cache = world.prefill()
    cache.past[2] = torch.randn(2, 2, 10, 16)
    with pytest.raises(GhostError) as error:
        world.find(cache)
    refused(error)


def test_layers_of_different_sequences_are_refused(world: World) -> None:
    one, other = world.prefill(), world.prefill()
    with pytest.raises(GhostError, match="layers come from different sequences") as error:
        world.find(Cache(one.past[:4] + other.past[4:]))
    refused(error)


def test_rows_of_different_sequences_are_refused(world: World) -> None:
    one, other = world.prefill(batch=1), world.prefill(batch=1)
    with pytest.raises(GhostError, match="rows come from different sequences") as error:
        world.find(Cache([torch.cat(pair) for pair in zip(one.past, other.past, strict=True)]))
    refused(error)


def test_tensors_of_different_lengths_are_refused(world: World) -> None:
    cache = world.prefill()
    cache.past[3] = cache.past[3][:, :, :4]
    with pytest.raises(GhostError, match="different lengths") as error:
        world.find(cache)
    refused(error)


def test_a_cache_longer_than_what_was_computed_is_refused(world: World) -> None:
    cache = world.prefill()
    with pytest.raises(GhostError):
        world.find(cache.changed(lambda x: torch.cat([x, x], dim=2)))


# Fallbacks and memory


def test_places_are_known_for_ghosts_and_their_copies(world: World) -> None:
    cache = world.prefill()
    assert [world.table.place_of(ghost) for ghost in cache.past] == list(range(6))
    assert [world.table.place_of(ghost.clone()) for ghost in cache.past] == list(range(6))
    assert world.table.place_of(torch.randn(2, 2, 10, 16)) is None


def test_a_sequence_without_ghosts_goes_with_the_next_prompt(world: World) -> None:
    cache = world.prefill()
    cache = world.step(cache)
    sequence = weakref.ref(world.find(cache))
    assert world.table.nbytes == world.find(cache).nbytes > 0
    del cache
    other = world.prefill()
    assert sequence() is None, "nothing but the table's own entry kept it"
    assert world.table.nbytes == world.find(other).nbytes


def test_a_sequence_lives_as_long_as_any_of_its_ghosts(world: World) -> None:
    cache = world.prefill()
    number = world.find(cache).number
    last = cache.past[-1][:, :, :3]
    del cache
    other = world.prefill()
    assert number in world.table._by_number
    del last
    third = world.prefill()
    assert set(world.table._by_number) == {world.find(other).number, world.find(third).number}


def test_nothing_is_kept_of_ghosts_that_died(world: World) -> None:
    cache = world.prefill()
    for _ in range(20):
        cache = world.step(cache)
    assert len(world.table._by_storage) == 6
    del cache
    assert not world.table._by_storage


def test_forks_are_released_with_their_ghosts(world: World) -> None:
    cache = world.prefill()
    forks = []
    for _ in range(5):
        copied = world.step(cache.changed(copy.deepcopy))
        forks.append(weakref.ref(world.find(copied)))
        del copied
    world.prefill()
    assert [fork() for fork in forks] == [None] * 5
    assert world.find(cache).rows[0].length == 10 + AHEAD


def test_a_table_goes_with_its_model(world: World) -> None:
    """Ghosts that outlive the table hold neither it nor its sequences for ever."""
    cache = world.prefill()
    table, sequence = weakref.ref(world.table), weakref.ref(world.find(cache))
    world.table = SequenceTable()
    del cache
    gc.collect()
    assert (table(), sequence()) == (None, None)


def show_newest(world: World, columns: int, widths: list[int]) -> tuple[Sequence, list[Tensor]]:
    """A sequence of so many columns, and ghosts that show the newest widths[i] of them at site i."""
    sequence = world.table.create(world.sites, 2)
    world.fill(sequence.full, 0, columns)
    for row in sequence.rows:
        row.length = columns
    return sequence, [ghost for pair in world.table.mint(sequence, columns, CPU, widths) for ghost in pair]


def test_ghosts_of_sliding_layers_show_fewer_columns_than_they_stand_for(world: World) -> None:
    sequence, past = show_newest(world, 10, [4, 10, 4])
    assert [ghost.shape[2] for ghost in past] == [4, 4, 10, 10, 4, 4]
    assert world.table.find(past) == (sequence, 10)
    assert world.table.find(past, 10) == (sequence, 10)


def test_a_copy_of_sliding_ghosts_has_the_length_of_layers_that_show_all(world: World) -> None:
    sequence, past = show_newest(world, 10, [4, 10, 4])
    found = world.table.find([ghost.clone() for ghost in past])
    assert found is not None
    assert (found[0] is not sequence, found[1]) == (True, 10)
    assert torch.equal(found[0].full.keys[0][:, :, :10], sequence.full.keys[0][:, :, :10])


def test_a_copy_of_sliding_ghosts_alone_needs_a_counted_length(world: World) -> None:
    _, past = show_newest(world, 10, [4, 4, 4])
    copied = [ghost.clone() for ghost in past]
    with pytest.raises(GhostError, match="does not say how long it is"):
        world.table.find(copied)
    found = world.table.find(copied, 10)
    assert found is not None
    assert found[0].rows[0].length == 10


def test_a_counted_length_beyond_what_was_computed_is_refused(world: World) -> None:
    _, past = show_newest(world, 10, [4, 4, 4])
    with pytest.raises(GhostError, match="longer than what was computed"):
        world.table.find(past, 11)
