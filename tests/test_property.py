"""Random callers: whatever is done to a cache, every step gives what the uncompiled model gives on its own cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCABULARY, make_prompt, make_tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vericache_compile import stats
from vericache_compile.runtime import compression, drafting

CONFIGURATIONS: list[Any] = [
    (1, {"compressor": "kivi", "bits": 2, "window": 8}),
    (3, {"compressor": "streaming", "keep": 0.2, "window": 4}),
    *(
        pytest.param(configuration, marks=pytest.mark.slow)
        for configuration in (
            (1, {"compressor": "streaming", "keep": 0.2, "window": 8}),
            (3, {"compressor": "kivi", "bits": 2, "window": 4}),
            (3, {"compressor": "0: h2o(refresh=6), 1: kvzip, rest: quest(whole=0, page=4)", "window": 4}),
        )
    ),
]
PROMPTS = (70, 41)
"""Tokens of the two prompts that a series starts with."""
STEPS = 30
"""Forward calls in a series, at most."""


@dataclass
class History:
    """One sequence as both sides hold it."""

    plain: DynamicCache
    ours: DynamicCache
    mask: Tensor
    """[B, columns]; zero in the left padding."""
    expected: list[Tensor] = field(default_factory=list)
    """The plain model's argmax [B, 1] after each column."""

    @property
    def columns(self) -> int:
        return int(self.mask.shape[1])

    def copy(self) -> History:
        return History(copy.deepcopy(self.plain), copy.deepcopy(self.ours), self.mask, list(self.expected))


class Caller:
    """Drives the compiled model and the plain one alike, and compares them after each call."""

    def __init__(self, plain: PreTrainedModel, ours: PreTrainedModel, batch: int) -> None:
        self.plain, self.ours, self.batch = plain, ours, batch
        self.steps = 0
        self.histories = [self._start(tokens, seed) for seed, tokens in enumerate(PROMPTS)]
        self.current = 0

    @property
    def history(self) -> History:
        return self.histories[self.current]

    def _start(self, tokens: int, seed: int) -> History:
        inputs = make_prompt(tokens, self.batch, seed=seed)
        empty = inputs["attention_mask"][:, :0]
        history = History(DynamicCache(config=self.plain.config), DynamicCache(config=self.ours.config), empty)
        self._call(history, inputs["input_ids"], inputs["attention_mask"])
        return history

    def _call(self, history: History, tokens: Tensor, shown: Tensor | None = None) -> None:
        """Feed tokens [B, T] to both models."""
        self.steps += 1
        count = tokens.shape[1]
        history.mask = torch.cat([history.mask, torch.ones_like(tokens) if shown is None else shown], dim=1)
        inputs: dict[str, Tensor] = {"input_ids": tokens}
        if self.batch > 1:  # as generate passes them; the loop over one sequence passes neither
            positions = (history.mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]
            inputs |= {"attention_mask": history.mask, "position_ids": positions}
        expected = self.plain(**inputs, past_key_values=history.plain).logits
        found = self.ours(**inputs, past_key_values=history.ours).logits
        real = history.mask[:, -count:].bool()
        torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
        assert torch.equal(found[real].argmax(-1), expected[real].argmax(-1))
        assert history.ours.get_seq_length() == history.plain.get_seq_length() == history.columns
        history.expected += list(expected.argmax(-1).split(1, dim=1))

    def feed(self, count: int) -> None:
        """Greedy decoding, `count` tokens."""
        for _ in range(count):
            self._call(self.history, self.history.expected[-1])

    def surprise(self, shift: int, row: int) -> None:
        """A token that greedy decoding would not give; in a batch, in one row only."""
        tokens = self.history.expected[-1].clone()
        tokens[row % self.batch] = (tokens[row % self.batch] + shift) % VOCABULARY
        self._call(self.history, tokens)

    def pad(self, count: int, row: int) -> None:
        """One row is fed the same token whatever is predicted, as generate does with a row that has ended."""
        for _ in range(count):
            tokens = self.history.expected[-1].clone()
            tokens[row % self.batch] = 0
            self._call(self.history, tokens)

    def turn(self, count: int, seed: int) -> None:
        """Several new tokens at once."""
        generator = torch.Generator().manual_seed(seed)
        self._call(self.history, torch.randint(1, VOCABULARY, (self.batch, count), generator=generator))

    def crop(self, count: int) -> None:
        """Take back the last tokens; at least one real one of every row stays."""
        history = self.history
        least = 1 + int((history.mask == 0).sum(-1).max())
        kept = max(history.columns - count, least)
        if kept == history.columns:
            return
        history.plain.crop(kept - history.columns)
        history.ours.crop(kept - history.columns)
        history.mask, history.expected = history.mask[:, :kept], history.expected[:kept]

    def switch(self, index: int) -> None:
        """Go on with another cache."""
        self.current = index % len(self.histories)

    def fork(self, count: int) -> None:
        """Deep-copy the cache and go on with the copy; `switch` may return to the original."""
        self.histories.append(self.history.copy())
        self.current = len(self.histories) - 1
        self.feed(count)


COUNTS = st.integers(1, 6)
ROWS = st.integers(0, 2)
ACTIONS: st.SearchStrategy[tuple[Any, ...]] = st.one_of(
    st.tuples(st.just(Caller.feed), st.integers(1, 12)),
    st.tuples(st.just(Caller.surprise), st.integers(1, VOCABULARY - 1), ROWS),
    st.tuples(st.just(Caller.pad), COUNTS, ROWS),
    st.tuples(st.just(Caller.turn), st.integers(2, 5), st.integers(0, 99)),
    st.tuples(st.just(Caller.crop), st.integers(1, 20)),
    st.tuples(st.just(Caller.switch), st.integers(0, 3)),
    st.tuples(st.just(Caller.fork), COUNTS),
)


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids=lambda p: f"{p[1]['compressor']}-{p[0]}")
def make_caller(request: pytest.FixtureRequest) -> Iterator[Callable[[], Caller]]:
    """Callers of one compiled model; tails are short, so that they are compressed in often."""
    batch, options = request.param
    plain, ours = make_tiny("llama", layers=3), make_tiny("llama", layers=3)
    ours.compile(backend="vericache", options={**options, "inductor": False})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafting, "CHUNK", 6)
        patch.setattr(compression, "EXACT", 4)
        yield lambda: Caller(plain, ours, batch)
    found = stats(ours)
    assert found["rounds"] > 0
    assert found["accepted"] > 0
    assert found["graphs"]["not taken"] == 0


SERIES = st.lists(ACTIONS, min_size=3, max_size=14)


@torch.no_grad()
def check(make_caller: Callable[[], Caller], actions: list[tuple[Any, ...]]) -> None:
    caller = make_caller()
    for act, *arguments in actions:
        if caller.steps < STEPS:
            act(caller, *arguments)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(actions=SERIES)
def test_every_step_equals_the_uncompiled_models(
    make_caller: Callable[[], Caller], actions: list[tuple[Any, ...]]
) -> None:
    check(make_caller, actions)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True)
@given(actions=SERIES)
def test_every_step_of_more_series_equals_the_uncompiled_models(
    make_caller: Callable[[], Caller], actions: list[tuple[Any, ...]]
) -> None:
    check(make_caller, actions)
