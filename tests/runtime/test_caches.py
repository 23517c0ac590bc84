"""The full cache keeps every byte; the draft cache is a compressed region, aligned right, and an exact tail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.adakv import AdaKV
from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.borrowed import BorrowedKV, Borrower
from vericache_compile.compressors.chain import Chain
from vericache_compile.compressors.dense import DenseKV
from vericache_compile.compressors.kivi import Kivi
from vericache_compile.compressors.kvreviver import KVReviver
from vericache_compile.compressors.none import NoCompression, UncompressedKV
from vericache_compile.compressors.packkv import PackKV
from vericache_compile.compressors.per_layer import PerLayer
from vericache_compile.compressors.snapkv import SnapKV
from vericache_compile.compressors.streaming import Streaming
from vericache_compile.plan import Site
from vericache_compile.runtime.attention import BLOCK, Visible
from vericache_compile.runtime.caches import GROWTH, DraftKV, DraftLayer, FullKV, room_for
from vericache_compile.runtime.compression import EXACT, compress, extend
from vericache_compile.runtime.sliding import OutOfWindow

Sites = Callable[..., list[Site]]
Fill = Callable[..., None]
CPU = torch.device("cpu")
COMPRESSORS: list[Compressor] = [
    NoCompression(),
    Streaming(keep=0.2),
    SnapKV(keep=0.2),
    Kivi(bits=2),
    Kivi(bits=4),
    Chain(SnapKV(keep=0.5), Kivi()),
    SnapKV(keep=0.2, window=48),
    Kivi(residual=64),
]
PADS, COLUMNS = [0, 10, 60], [300, 290, 75]
"""Rows of 300, 280 and 15 tokens: the last is too short for SnapKV and KIVI to cover anything."""


def tokens_of(full: FullKV, count: int, seed: int = 9) -> list[tuple[Tensor, Tensor]]:
    """New keys [B, K, T, D] and values [B, K, T, E] for every site."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(full.batch, s.kv_heads, count, s.head_size, generator=generator).to(s.dtype),
            torch.randn(full.batch, s.kv_heads, count, s.value_size, generator=generator).to(s.dtype),
        )
        for s in full.sites
    ]


def storages(tensors: Iterator[Tensor]) -> int:
    """Bytes of the distinct storages of tensors."""
    held = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held if storage.nbytes()}.values())


def tensors_of(value: object) -> Iterator[Tensor]:
    """Every tensor that a draft layer or a region holds."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, DraftLayer) or hasattr(value, "materialize"):
        yield from tensors_of(list(vars(value).values()))


def test_room_is_whole_blocks(make_sites: Sites) -> None:
    full = FullKV(make_sites(), batch=3)
    assert (full.columns, full.nbytes) == (0, 0)
    for columns in (1, BLOCK, BLOCK + 1, 5 * BLOCK + 3):
        full.reserve(columns, CPU)
        assert columns <= full.columns < columns + BLOCK
        assert full.columns % BLOCK == 0
        assert all(x.shape[2] == full.columns for x in (*full.keys, *full.values))


def test_room_does_not_depend_on_how_it_came_to_be() -> None:
    rooms = [room_for(columns) for columns in range(1, 40_000)]
    for columns, room in enumerate(rooms, 1):
        assert 0 <= room - columns < max(BLOCK, min(columns / 16, GROWTH))
        assert room % BLOCK == 0
        assert room_for(room) == room
    assert rooms == sorted(rooms)


def test_nothing_is_allocated_when_there_is_room(make_sites: Sites) -> None:
    full = FullKV(make_sites(), batch=1)
    full.reserve(100, CPU)
    before = [x.data_ptr() for x in (*full.keys, *full.values)]
    full.reserve(full.columns, CPU)
    full.reserve(1, CPU)
    assert [x.data_ptr() for x in (*full.keys, *full.values)] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_growth_keeps_every_byte(make_sites: Sites, fill: Fill, dtype: torch.dtype) -> None:
    full = FullKV(make_sites(value_size=24, dtype=dtype), batch=2)
    fill(full, 0, 500)
    columns, before = full.columns, [x.clone() for x in (*full.keys, *full.values)]
    full.reserve(full.columns + 1, CPU)
    for old, new in zip(before, (*full.keys, *full.values), strict=True):
        assert torch.equal(new[:, :, :columns], old)
        assert not new[:, :, columns:].any()


@pytest.mark.parametrize("latent", [False, True])
def test_room_is_given_back_and_what_lies_before_it_kept(make_sites: Sites, fill: Fill, latent: bool) -> None:
    sites = [replace(site, latent=latent) for site in make_sites(value_size=12)]
    full, never = FullKV(sites, batch=2), FullKV(sites, batch=2)
    fill(full, 0, 3 * BLOCK)
    never.reserve(BLOCK + 1, CPU)
    before = [x[:, :, : 2 * BLOCK].clone() for x in (*full.keys, *full.values)]
    full.give_back(BLOCK + 1)
    assert (full.columns, full.nbytes) == (never.columns, never.nbytes)
    assert all(map(torch.equal, before, (*full.keys, *full.values)))
    full.give_back(5 * BLOCK)
    assert full.columns == 2 * BLOCK


def test_full_nbytes_are_those_allocated(make_sites: Sites) -> None:
    full = FullKV(make_sites(3, value_size=24, dtype=torch.bfloat16), batch=2)
    full.reserve(300, CPU)
    assert full.nbytes == storages(iter((*full.keys, *full.values)))
    assert full.nbytes == 3 * 2 * 2 * full.columns * (16 + 24) * 2


@pytest.mark.parametrize("columns", [[7, 7, 7], [0, 250, 31]])
def test_append_writes_each_row_where_it_stands(make_sites: Sites, fill: Fill, columns: list[int]) -> None:
    full = FullKV(make_sites(value_size=24), batch=3)
    fill(full, 0, 300)
    before = [(k.clone(), v.clone()) for k, v in zip(full.keys, full.values, strict=True)]
    for layer, (k, v) in enumerate(tokens_of(full, 5)):
        full.append(layer, k, v, columns)
        for held, old, new in zip((full.keys[layer], full.values[layer]), before[layer], (k, v), strict=True):
            expected = old.clone()
            for b, column in enumerate(columns):
                expected[b, :, column : column + 5] = new[b]
            assert torch.equal(held, expected)


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [1, 1, 1, 0], [2]])
def test_select_copies_rows_up_to_a_column(make_sites: Sites, fill: Fill, rows: list[int]) -> None:
    full = FullKV(make_sites(value_size=24), batch=3)
    fill(full, 0, 300)
    before = [x.clone() for x in (*full.keys, *full.values)]
    copy = full.select(rows, 270)
    assert copy.batch == len(rows)
    for mine, theirs in zip((*copy.keys, *copy.values), before, strict=True):
        assert torch.equal(mine[:, :, :270], theirs[rows, :, :270])
        assert not mine[:, :, 270:].any()
        mine.fill_(float("nan"))
    assert all(torch.equal(x, y) for x, y in zip((*full.keys, *full.values), before, strict=True))


def test_caches_made_under_inference_mode_can_be_written_outside(make_sites: Sites) -> None:
    full = FullKV(make_sites(), batch=1)
    with torch.inference_mode():
        full.reserve(10, CPU)
    assert not any(x.is_inference() for x in (*full.keys, *full.values))


@dataclass
class Made:
    """A draft cache, the full cache under it, and how long its rows are."""

    draft: DraftKV
    full: FullKV
    pads: list[int]
    columns: list[int]

    def extended(self, room: int) -> Made:
        """What the tails have gathered, compressed in."""
        queries = queries_of(self.full, self.draft.compressor)
        extend(self.draft, self.full, self.pads, self.columns, queries, room)
        return self

    def write(self, count: int) -> None:
        """The next `count` tokens of every row, as verify writes them: to the full cache and to the tail."""
        for layer, (k, v) in enumerate(tokens_of(self.full, count)):
            self.full.reserve(max(self.columns) + count, CPU)
            self.full.append(layer, k, v, self.columns)
            self.draft.layers[layer].write(k, v, self.columns)
        self.columns = [column + count for column in self.columns]


def queries_of(full: FullKV, compressor: Compressor) -> list[list[Tensor | None]]:
    """Random queries [H, w, D] for every site and row, if the method reads any."""
    generator = torch.Generator().manual_seed(3)
    count = compressor.queries
    return [
        [
            torch.randn(s.heads, count, s.head_size, generator=generator).to(s.dtype) if count else None
            for _ in range(full.batch)
        ]
        for s in full.sites
    ]


@pytest.fixture(params=COMPRESSORS, ids=str)
def make_draft(request: pytest.FixtureRequest, make_sites: Sites, fill: Fill) -> Callable[..., Made]:
    """A draft cache of rows of the given paddings and lengths."""

    def make(pads: list[int] = PADS, columns: list[int] = COLUMNS, room: int = 50, value_size: int = 16) -> Made:
        full = FullKV(make_sites(value_size=value_size), len(pads))
        fill(full, 0, max(columns) + 1)
        full.reserve(2 * max(columns), CPU)
        queries = queries_of(full, request.param)
        return Made(compress(request.param, full, pads, columns, queries, room), full, list(pads), list(columns))

    return make


@pytest.mark.parametrize(
    ("method", "kept"),
    [
        (Kivi(bits=2), True),
        (Chain(SnapKV(keep=1.0), Kivi()), True),
        (KVReviver(keep=1.0), True),
        (KVReviver(keep=0.3), False),
        (PackKV(), False),
        (Chain(SnapKV(keep=1.0), PackKV()), False),
        (PerLayer(((range(1), PackKV()), (None, Borrower(lender=0)))), False),
        (SnapKV(keep=0.3), False),
        (AdaKV(keep=0.8, kernel=1), False),
    ],
    ids=str,
)
def test_sites_that_need_places_hold_all_tokens_in_order(
    make_sites: Sites, fill: Fill, method: Compressor, kept: bool
) -> None:
    """Else every token as it was cached; also where one head keeps all, as one of AdaKV's does here."""
    full = FullKV(make_sites(), batch=1)
    fill(full, 0, 300)
    full.keys[1][:, 1] *= 100  # queries of this head see one token each
    draft = compress(method, full, [0], [300], queries_of(full, method), 50, placed=[1])
    assert isinstance(draft.layers[1].regions[0], UncompressedKV) != kept
    assert draft.whole != kept


def read_rows(made: Made) -> list[tuple[Tensor, Tensor]]:
    """The keys and values [K, S, *] that attention sees, site by site and row by row."""
    rows = []
    for layer in made.draft.layers:
        keys, values, visible = layer.read(made.columns)
        for b, ((left, *_), right) in enumerate(zip(*visible, strict=True)):
            rows.append((keys[b][:, left:right], values[b][:, left:right]))
    return rows


def assert_reads_region_and_tail(made: Made) -> None:
    """Every row reads its region, then the full cache's own bytes, and nothing else."""
    reads = iter(read_rows(made))
    for number, layer in enumerate(made.draft.layers):
        full = (made.full.keys[number], made.full.values[number])
        for b, region in enumerate(layer.regions):
            tail = slice(layer.starts[b], made.columns[b])
            for read, held, exact in zip(next(reads), region.materialize(), full, strict=True):
                assert torch.equal(read, torch.cat([held, exact[b, :, tail]], dim=1))


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether two readings agree to the bit."""
    return all(torch.equal(x, y) for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True))


def test_rows_read_their_region_and_an_exact_tail(make_draft: Callable[..., Made]) -> None:
    assert_reads_region_and_tail(make_draft())
    assert_reads_region_and_tail(make_draft(value_size=24))


def test_regions_are_aligned_at_their_right_end(make_draft: Callable[..., Made]) -> None:
    made = make_draft()
    for layer in made.draft.layers:
        assert layer.slots == max(region.slots for region in layer.regions)
        assert layer.starts == [pad + region.covered for pad, region in zip(PADS, layer.regions, strict=True)]
        lefts = tuple((layer.slots - region.slots,) * layer.keys.shape[1] for region in layer.regions)
        rights = tuple(layer.slots + column - start for column, start in zip(made.columns, layer.starts, strict=True))
        assert layer.read(made.columns)[2] == Visible(lefts, rights)


def test_only_the_row_itself_is_compressed(make_draft: Callable[..., Made]) -> None:
    """What lies in the padding or past a row's length leaves no trace."""
    made = make_draft()
    before = read_rows(made)
    for held in (*made.full.keys, *made.full.values):
        for b, (pad, column) in enumerate(zip(PADS, COLUMNS, strict=True)):
            held[b, :, :pad], held[b, :, column:] = float("nan"), float("nan")
    queries = queries_of(made.full, made.draft.compressor)
    made.draft = compress(made.draft.compressor, made.full, PADS, COLUMNS, queries, 50)
    assert same(read_rows(made), before)


def test_written_tokens_join_the_tail(make_draft: Callable[..., Made]) -> None:
    made = make_draft()
    made.write(7)
    assert_reads_region_and_tail(made)
    made.write(1)
    assert_reads_region_and_tail(made)


def test_a_lower_length_is_all_that_rollback_takes(make_draft: Callable[..., Made]) -> None:
    made = make_draft()
    before = [(k.clone(), v.clone()) for k, v in read_rows(made)]
    made.write(9)
    assert read_rows(made)[0][0].shape[1] == before[0][0].shape[1] + 9
    made.columns = list(COLUMNS)
    assert same(read_rows(made), before)


def test_draft_nbytes_are_those_allocated(make_draft: Callable[..., Made]) -> None:
    draft = make_draft(value_size=24).draft
    assert draft.nbytes == sum(layer.nbytes for layer in draft.layers)
    assert draft.nbytes == storages(tensors_of(draft.layers))


def test_dense_regions_live_in_the_buffer_that_attention_reads(make_draft: Callable[..., Made]) -> None:
    for layer in make_draft().draft.layers:
        dense = [region for region in layer.regions if isinstance(region, DenseKV)]
        assert layer.packed is not bool(dense)
        held = {layer.keys.untyped_storage().data_ptr(), layer.values.untyped_storage().data_ptr()}
        assert {x.untyped_storage().data_ptr() for region in dense for x in region.materialize()} <= held


def test_room_counts_down_to_the_last_column(make_draft: Callable[..., Made]) -> None:
    made = make_draft(room=20)
    assert made.draft.room(made.columns) == 20
    made.write(15)
    assert made.draft.room(made.columns) == 5
    made.write(5)
    assert made.draft.room(made.columns) == 0
    assert_reads_region_and_tail(made)


def test_room_is_that_of_the_fullest_tail(make_draft: Callable[..., Made]) -> None:
    made = make_draft([0, 0], [200, 200], room=20)
    assert made.draft.room([200, 205]) == 15
    assert made.draft.room([190, 190] if made.draft.valid([190, 190]) else [200, 200]) >= 20


def test_a_draft_holds_while_no_region_is_cut_into(make_draft: Callable[..., Made]) -> None:
    made = make_draft()
    starts = made.draft.layers[0].starts
    assert made.draft.valid(COLUMNS)
    assert made.draft.valid(starts)
    for b in range(len(starts)):
        assert not made.draft.valid([start - (row == b) for row, start in enumerate(starts)])


def test_full_tails_are_compressed_in(make_draft: Callable[..., Made]) -> None:
    made = make_draft(room=200)
    made.write(180)
    before = made.draft.layers[0].starts
    made = made.extended(room=64)
    assert made.draft.room(made.columns) == 64
    assert_reads_region_and_tail(made)
    for layer in made.draft.layers:
        for start, old, column in zip(layer.starts, before, made.columns, strict=True):
            assert start > old
            newest = max(EXACT, made.draft.compressor.least_tail)
            assert newest <= column - start < newest + 32, "whole groups are covered, up to the exact tokens"


def test_extending_again_and_again_keeps_the_tails_exact(make_draft: Callable[..., Made]) -> None:
    made = make_draft([0, 3], [40, 9], room=40)
    for _ in range(6):
        made.write(40)
        made = made.extended(room=60)
        assert_reads_region_and_tail(made)


def test_regions_grow_in_the_buffers_that_they_have(make_draft: Callable[..., Made]) -> None:
    """And draft reads there what it would read from new ones, row by row, again and again."""
    made, other = (make_draft([0, 3, 40], [90, 60, 41], room=120) for _ in range(2))
    stayed: list[bool] = []
    for _ in range(4):
        before = [layer.keys for layer in made.draft.layers]
        for each, room in ((made, 60), (other, 400)):
            each.write(40)
            each.extended(room)
        stayed += [layer.keys is held for layer, held in zip(made.draft.layers, before, strict=True)]
        assert same(read_rows(made), read_rows(other))
        assert_reads_region_and_tail(made)
        assert 40 <= made.draft.room(made.columns) <= 60
    assert stayed[0]
    assert stayed.count(True) >= len(stayed) / 2


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("method", [NoCompression(), Streaming(keep=0.3)], ids=str)
def test_a_region_that_does_not_grow_moves_aside_for_one_that_does(
    method: Compressor, latent: bool, make_sites: Sites, fill: Fill
) -> None:
    """Within a buffer that it half fills: as its values do where they are a part of the keys."""
    sites = [replace(site, kv_heads=1, head_size=24, latent=latent) for site in make_sites(2)]
    full = FullKV(sites, 2)
    generator = torch.Generator().manual_seed(0)
    full.reserve(600, CPU)
    for site in sites:
        keys = torch.randn(2, 1, 560, 24, generator=generator)
        full.append(site.layer, keys, keys[..., :16] if latent else torch.randn(2, 1, 560, 16), [0, 0])
    unseen: list[list[Tensor | None]] = [[None, None]] * 2
    draft = compress(method, full, [0, 0], [300, 300], unseen, 600)
    for layer in draft.layers:
        layer.write(full.keys[0][:, :, 300:500], full.values[0][:, :, 300:500], [300, 300])
    regions = [tuple(part.clone() for part in layer.regions[1].materialize()) for layer in draft.layers]
    buffers = [layer.keys for layer in draft.layers]
    extend(draft, full, [0, 0], [500, 310], unseen, 100)
    for layer, region, buffer in zip(draft.layers, regions, buffers, strict=True):
        assert layer.keys is buffer
        assert layer.regions[1].slots < layer.slots
        for part, before in zip(layer.regions[1].materialize(), region, strict=True):
            assert torch.equal(part, before)


def test_a_buffer_without_room_is_left_for_a_larger_one(make_draft: Callable[..., Made]) -> None:
    made = make_draft([0], [300], room=90)
    before = [layer.keys for layer in made.draft.layers]
    made.write(90)
    made.extended(room=400)
    assert all(layer.keys is not held for layer, held in zip(made.draft.layers, before, strict=True))
    assert made.draft.room(made.columns) == 400
    assert_reads_region_and_tail(made)


def test_a_short_tail_is_left_alone(make_draft: Callable[..., Made]) -> None:
    made = make_draft([0, 3], [200, 20])
    regions = [layer.regions[1].covered for layer in made.draft.layers]
    again = made.extended(room=64)
    assert [layer.regions[1].covered for layer in again.draft.layers] == regions
    assert_reads_region_and_tail(again)


def test_a_row_of_one_token(make_draft: Callable[..., Made]) -> None:
    made = make_draft([0, 4], [5, 5])
    assert_reads_region_and_tail(made)
    made.write(3)
    assert_reads_region_and_tail(made)


def test_queries_that_were_never_seen_are_made_up_from_keys(make_draft: Callable[..., Made]) -> None:
    """A cache that an uncompiled model built comes without queries."""
    made = make_draft()
    unseen: list[list[Tensor | None]] = [[None] * len(PADS) for _ in made.full.sites]
    made.draft = compress(made.draft.compressor, made.full, PADS, COLUMNS, unseen, 200)
    assert_reads_region_and_tail(made)
    made.write(180)
    extend(made.draft, made.full, PADS, made.columns, unseen, 50)
    assert_reads_region_and_tail(made)


def test_a_sliding_site_keeps_its_window_exactly_and_no_region(make_sites: Sites, fill: Fill) -> None:
    sites = make_sites(2)
    full = FullKV(sites, 2)
    full.reserve(120, torch.device("cpu"))
    fill(full, 0, 100)
    columns, pads, reach = [60, 100], [0, 95], 16
    queries: list[list[Tensor | None]] = [[None, None]] * 2
    draft = compress(Streaming(keep=0.2), full, pads, columns, queries, 20, reaches=[reach, None])
    sliding = draft.layers[0]
    assert (draft.reaches, sliding.starts, sliding.slots) == ([reach, None], [45, 95], 0)
    keys, values, visible = sliding.read([column + 1 for column in columns])
    assert visible == Visible(((0, 0), (0, 0)), (16, 6))
    assert torch.equal(keys[0, :, :15], full.keys[0][0, :, 45:60])
    assert torch.equal(values[1, :, :5], full.values[0][1, :, 95:100])
    _, _, later = sliding.read([70, 103])
    assert later == Visible(((9, 9), (0, 0)), (25, 8)), "the window moves on through the tail"
    assert sliding.valid([60, 97]), "padding is before any window"
    assert not sliding.valid([59, 100]), "a window that starts before the tail does"


def test_a_site_borrows_from_one_of_its_own_shape_alone(make_sites: Sites, fill: Fill) -> None:
    """The lender of the third site has other values than it; that of the last one is like it."""
    sites = [replace(site, value_size=16 if site.layer else 8) for site in make_sites(4)]
    sites = [replace(site, value_size=12 if site.layer == 1 else site.value_size) for site in sites]
    full = FullKV(sites, 1)
    fill(full, 0, 80)
    unseen: list[list[Tensor | None]] = [[None]] * 4
    method = PerLayer(((range(2), NoCompression()), (range(2, 3), Borrower(1)), (None, Borrower(2))))
    draft = compress(method, full, [0], [80], unseen, 20)
    for _ in range(2):
        lent = [isinstance(layer.regions[0], BorrowedKV) for layer in draft.layers]
        assert lent == [False, False, False, True]
        assert [layer.values.shape[3] for layer in draft.layers] == [8, 12, 16, 16]
        assert torch.equal(
            draft.layers[2].regions[0].materialize()[1], full.values[2][0, :, : draft.layers[2].starts[0]]
        )
        extend(draft, full, [0], [80], unseen, 20)


def test_tokens_out_of_a_window_take_no_slot() -> None:
    keys, values = torch.ones(2, 7, 16), torch.ones(2, 7, 8)
    made = OutOfWindow.like(keys, values, 7).extend(keys[:, :3], values[:, :3], None)
    assert (made.covered, made.slots, made.nbytes) == (10, 0, 0)
    assert [part.shape for part in made.materialize()] == [(2, 0, 16), (2, 0, 8)]
