"""How `placement="auto"` chooses, by a model's numbers and what rounds gave so far."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vericache_compile import load
from vericache_compile.compressors.spec import parse
from vericache_compile.config import Config
from vericache_compile.estimate import measure
from vericache_compile.load import Auto
from vericache_compile.machine import Bandwidths
from vericache_compile.plan import Site, Way
from vericache_compile.runtime.counts import Counts, Round
from vericache_compile.runtime.executor import WeightCasts

SITES = [Site(layer, 32, 8, 128, 128, 128**-0.5, torch.bfloat16, (2 * layer, 2 * layer + 1)) for layer in range(32)]
KV = 131072 * 33_000
"""Bytes of full KV of the tokens below, about."""


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch) -> Auto:
    """A model of the 8B class on a GPU of 4.8 TB/s whose link carries 55 GB/s."""
    monkeypatch.setattr(load, "bandwidths", lambda device: Bandwidths(4800.0, 55.0))
    config = Config(compressor="snapkv", keep=0.2, window=32)
    measured = measure(parse("snapkv(keep=0.2)", {}), SITES)
    weights = {torch.bfloat16: 8_000_000_000}
    return Auto(config, measured, weights, torch.device("cuda"), Counts(), WeightCasts())


def rounds_of(accepted: int, count: int = 20) -> list[Round]:
    return [Round(0.0, 0.0, 0.0, 0.1, 0.1, 2, 62, accepted) for _ in range(count)]


def test_full_kv_stays_where_it_fits_with_its_drafts(auto: Auto) -> None:
    assert auto(8, 32_000, 8 * 1.5 * KV).way is Way.RESIDENT
    auto.counts.latest += rounds_of(accepted=0)
    assert auto(8, 32_000, 8 * 1.5 * KV).way is Way.RESIDENT, "whether drafting pays is for rounds to say"


def test_swapping_is_chosen_where_full_kv_does_not_fit(auto: Auto) -> None:
    assert auto(8, 32_000, 8 * 0.6 * KV).way is Way.SWAPPED
    assert auto(8, 32_000, 0).way is Way.SWAPPED, "and where nothing does: it takes least"


def test_acceptance_decides_where_full_kv_fits_alone(auto: Auto, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight rows take 10.5 ms a token in place without drafts; a round, 158 ms over a link of 450 GB/s."""
    monkeypatch.setattr(load, "bandwidths", lambda device: Bandwidths(4800.0, 450.0))
    room = 8 * 1.1 * KV
    assert auto(8, 32_000, room).way is Way.SWAPPED
    auto.counts.latest += rounds_of(accepted=60, count=7)
    assert auto.tokens_per_round is None, "too few rounds to go by"
    auto.counts.latest += rounds_of(accepted=60)
    assert auto.tokens_per_round == pytest.approx(20.1, abs=0.1), "of 62 tokens two do not stand"
    assert auto(8, 32_000, room).way is Way.SWAPPED
    auto.counts.latest += rounds_of(accepted=4, count=512)
    assert auto.tokens_per_round == pytest.approx(3, abs=0.1)
    assert auto(8, 32_000, room).way is Way.OFF
    auto.counts.latest += [replace(each, drafted=0, accepted=0) for each in rounds_of(0, count=510)]
    assert auto.tokens_per_round is None, "it may be worth trying again"


def test_single_drafts_that_stand_say_nothing_against_long_ones(auto: Auto) -> None:
    auto.counts.latest += [replace(each, drafted=2, accepted=2) for each in rounds_of(0)]
    assert auto.tokens_per_round == 32


def test_the_ring_is_no_larger_than_what_is_left(auto: Auto, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless its size was given."""
    monkeypatch.setattr(load, "bandwidths", lambda device: Bandwidths(4800.0, 450.0))
    arranged = auto(8, 32_000, 8 * 0.5 * KV)
    assert arranged.ring_bytes is not None
    assert arranged.way is Way.SWAPPED
    assert arranged.draft_bytes + arranged.ring_bytes == pytest.approx(8 * 0.5 * KV)
    auto.config = Config(compressor="snapkv", keep=0.2, window=32, staging_mb=100)
    assert auto(8, 32_000, 8 * 0.5 * KV).ring_bytes is None


def test_the_link_decides_where_full_kv_fits_alone(auto: Auto) -> None:
    assert auto(8, 32_000, 8 * 1.1 * KV).way is Way.OFF


def test_what_would_be_faster_is_said_once(auto: Auto, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "vericache_compile"):
        auto(8, 32_000, 8 * 0.6 * KV)
        auto(8, 32_000, 8 * 0.6 * KV)
    [record] = caplog.records
    assert "swapped verify, 8 x 32000 tokens" in record.getMessage()
    assert "; resident verify, smaller batch, 3 x 32000 tokens, would give " in record.getMessage()
    assert "transfer = " in record.getMessage()


def test_copies_of_weights_that_are_not_made_yet_need_room(auto: Auto) -> None:
    """Where room is what is free on the device; where it is given, it is for KV."""
    low = Config(compressor="snapkv", keep=0.2, window=32, draft_dtype="int8")
    given = Config(compressor="snapkv", keep=0.2, window=32, draft_dtype="int8", device_memory_mb=1e6)
    room = 1.6 * KV
    for config, way in ((low, Way.OFF), (given, Way.RESIDENT)):
        auto.config, auto.device = config, torch.device("cpu")
        assert auto(1, 32_000, room).way is way
