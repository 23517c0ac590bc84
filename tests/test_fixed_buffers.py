"""Models of one's own that write keys and values into buffers at `input_pos`, as gpt-fast does, run in rounds."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Switch
from test_canonical import random_guess, use_drafter, wrong_guess
from torch import Tensor, nn

from vericache_compile import stats

EXAMPLE = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "fixed_buffers.py"))
VOCABULARY, COLUMNS = 101, 96
OPTIONS = {"inductor": False, "compressor": "streaming", "keep": 0.2, "window": 8, "strict": True}
EXACT = {"inductor": False, "compressor": "none", "draft_dtype": "same", "window": 8, "strict": True}


def make(seed: int = 0, batch: int = 1) -> Any:
    """The example's decoder, small; a wide initialisation keeps logits far from ties."""
    torch.manual_seed(seed)
    model = EXAMPLE["Decoder"](VOCABULARY, 64, heads=4, layers=2, batch=batch, columns=COLUMNS).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def prompt(tokens: int = 30, batch: int = 1, seed: int = 7) -> Tensor:
    return torch.randint(VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor, count: int, begin: int = 0, sample: bool = False) -> Tensor:
    """Logits [count, B, V] of a hand-written loop after ids [B, T] that stand at column `begin` and on."""
    input_pos, rows, generator = begin + torch.arange(ids.shape[1]), [], torch.Generator().manual_seed(3)
    for _ in range(count):
        rows.append(model(ids, input_pos)[:, -1])
        chances = (2 * rows[-1]).softmax(-1)
        ids = torch.multinomial(chances, 1, generator=generator) if sample else chances.argmax(-1, keepdim=True)
        input_pos = input_pos[-1:] + 1
    return torch.stack(rows)


def tokens_of(*given: Any, **more: Any) -> Tensor:
    return logits_of(*given, **more).argmax(-1)


def greedy(model: nn.Module) -> Tensor:
    """To the last column of the buffers."""
    return tokens_of(model, prompt(), COLUMNS - 29)


def sampling(model: nn.Module) -> Tensor:
    return tokens_of(model, prompt(), 30, sample=True)


def a_second_prompt(model: nn.Module) -> Tensor:
    """In the same buffers, shorter than the first, and one more turn behind it."""
    first, second = tokens_of(model, prompt(), 20), tokens_of(model, prompt(12, seed=8), 20)
    return torch.cat([first, second, tokens_of(model, prompt(6, seed=9), 20, begin=32)])


def rewound(model: nn.Module) -> Tensor:
    """Back by some columns and on with another token, again and again; then ahead, past columns never written."""
    parts = [tokens_of(model, prompt(), 20)]
    parts += [tokens_of(model, prompt(1, seed=seed), 9, begin=seed) for seed in (43, 35, 31)]
    return torch.cat([*parts, tokens_of(model, prompt(1), 9, begin=42), tokens_of(model, prompt(1), 9, begin=60)])


@pytest.mark.parametrize("call", [greedy, sampling, a_second_prompt, rewound])
def test_callers_get_plain_tokens_from_rounds(call: Callable[[nn.Module], Tensor]) -> None:
    model = make()
    model.compile(backend="vericache", options=OPTIONS)
    assert torch.equal(call(model), call(make()))
    assert stats(model)["rounds"] > 0
    assert stats(model)["graphs"]["not taken"] == 0


def test_two_models_of_one_make_keep_to_their_own_buffers() -> None:
    plain, ours = ([make(seed) for seed in (0, 1)] for _ in range(2))
    for model in ours:
        model.compile(backend="vericache", options=OPTIONS)
    for ids in (prompt(), prompt(20, seed=4)):
        for one, other in zip(ours, plain, strict=True):
            assert torch.equal(tokens_of(one, ids, 12), tokens_of(other, ids, 12))
    assert all(stats(model)["rounds"] > 0 for model in ours)


def test_the_callers_buffers_hold_what_plain_ones_hold() -> None:
    """Also where the caller goes on at a column that was computed ahead, but never fed."""
    plain, model = make(), make()
    model.compile(backend="vericache", options=EXACT)
    for tokens, count, begin in ((30, 10, 0), (1, 9, 41)):
        made, expected = (logits_of(each, prompt(tokens), count, begin=begin) for each in (model, plain))
        torch.testing.assert_close(made, expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(rewound(model), rewound(plain))
    for name, held in model.named_buffers():
        torch.testing.assert_close(held, plain.get_buffer(name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_rows_are_bit_equal_whatever_drafts_do(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a batch have one position for all, so they advance in step."""
    model, switch, ids = make(batch=batch), Switch(), prompt(batch=batch)
    model.compile(backend=switch)
    switch.options = EXACT
    first = logits_of(model, ids, 30)
    assert torch.equal(first.argmax(-1), tokens_of(make(batch=batch), ids, 30))
    for compressor in ("snapkv", "streaming"):
        switch.options = {**OPTIONS, "compressor": compressor}
        assert torch.equal(first, logits_of(model, ids, 30)), compressor
    use_drafter(monkeypatch, random_guess(VOCABULARY))
    assert torch.equal(first, logits_of(model, ids, 30)), "random guesses"
    use_drafter(monkeypatch, wrong_guess(VOCABULARY, first))
    assert torch.equal(first, logits_of(model, ids, 30)), "wrong guesses"
    assert stats(model)["rounds"] > 0


def test_buffers_whose_changes_nobody_counts_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    with torch.inference_mode(), caplog.at_level("WARNING", logger="vericache_compile"):
        for layer in model.layers:
            layer.attention.keys, layer.attention.values = layer.attention.keys + 0, layer.attention.values + 0
        model.compile(backend="vericache", options=OPTIONS)
        assert torch.equal(tokens_of(model, prompt(), 12), tokens_of(make(), prompt(), 12))
    assert stats(model)["rounds"] == 0
    [said] = [record.getMessage() for record in caplog.records if "no rounds" in record.getMessage()]
    assert "where: the cache" in said
    assert "fix: make the buffers outside of torch.inference_mode()" in said


def test_a_table_of_masks_whose_changes_nobody_counts_is_not_relied_on() -> None:
    model = make()
    with torch.inference_mode():
        model.seen = model.seen.clone()
    model.compile(backend="vericache", options=OPTIONS)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="a mask or position that depends on"):
        tokens_of(model, prompt(), 12)


class Given(nn.Module):
    """Buffers, column, mask and positions are all arguments; the column has no axis."""

    heads, size = 2, 16

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = self.heads * self.size
        self.embed, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(COLUMNS, width)
        self.to_qkv, self.to_logits = nn.Linear(width, 3 * width), nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor, k: Tensor, v: Tensor, at: Tensor, shown: Tensor, positions: Tensor) -> Tensor:
        """ids [B, T] for columns at [T] of k and v [B, H, C, D]; logits [B, T, V]."""
        x = self.embed(ids) + self.place(positions)
        q, new_k, new_v = self.to_qkv(x).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        k, v = k.index_copy_(2, at.view(-1), new_k), v.index_copy_(2, at.view(-1), new_v)
        return self.to_logits(x + F.scaled_dot_product_attention(q, k, v, shown).transpose(1, 2).flatten(2))


@torch.no_grad()
def padded(model: nn.Module, count: int = 30) -> tuple[Tensor, Tensor]:
    """Tokens [B, count] of a batch that is padded on the left by 0, 3 and 5; and the keys."""
    ids, pads = prompt(20, batch=3), torch.tensor([0, 3, 5])[:, None]
    k, v = torch.zeros(2, 3, Given.heads, COLUMNS, Given.size).unbind(0)
    at, columns, tokens = torch.arange(20), torch.arange(COLUMNS), []
    for _ in range(count):
        shown = (columns <= at.view(-1, 1)) & (columns >= pads[:, :, None])
        own = at if len(tokens) == 0 else at[0]
        ids = model(ids, k, v, own, shown[:, None], (at - pads).clamp(min=0))[:, -1:].argmax(-1)
        tokens.append(ids)
        at = at[-1:] + 1
    return torch.cat(tokens, dim=1), k


def test_buffers_given_as_arguments_with_left_padding() -> None:
    model = Given()
    model.compile(backend="vericache", options=OPTIONS)
    (ours, k), (plain, plain_k) = padded(model), padded(Given())
    assert torch.equal(ours, plain)
    torch.testing.assert_close(k, plain_k, atol=1e-4, rtol=1e-4)
    assert stats(model)["rounds"] > 0


@torch.no_grad()
def rows_by_turns(model: nn.Module) -> Tensor:
    """Tokens of other rows of the same buffers by turns, under one mask of three axes or four for them all."""
    ids, k, v = prompt(20, batch=3), *torch.zeros(2, 3, Given.heads, COLUMNS, Given.size).unbind(0)
    columns, at = torch.arange(COLUMNS), torch.arange(20)
    model(ids, k, v, at, (columns <= at[:, None])[None, None], at[None])
    made = []
    for step in range(18):
        rows = (slice(0, 2), slice(0, 3, 2), slice(0, 1))[step // 6]
        fed = ids[rows, -1:] if step % 6 == 0 else made[-1]
        at = torch.tensor(20 + step % 6)
        shown = (columns <= at)[None, None] if step % 2 else (columns <= at)[None, None, None]
        made.append(model(fed, k[rows], v[rows], at, shown, at.view(1, 1))[:, -1:].argmax(-1))
    return torch.cat(made)


def test_other_rows_of_the_same_buffers_are_other_caches() -> None:
    model = Given()
    model.compile(backend="vericache", options=OPTIONS)
    assert torch.equal(rows_by_turns(model), rows_by_turns(Given()))
    assert stats(model)["rounds"] > 0


@torch.no_grad()
def test_a_mask_of_two_axes_is_said_to_stop_rounds(caplog: pytest.LogCaptureFixture) -> None:
    def decode(model: nn.Module) -> Tensor:
        ids, (k, v), columns = (
            prompt(1),
            torch.zeros(2, 1, Given.heads, COLUMNS, Given.size).unbind(0),
            torch.arange(COLUMNS),
        )
        made = []
        for at in map(torch.tensor, range(8)):
            ids = model(ids, k, v, at, (columns <= at)[None], at.view(1, 1))[:, -1:].argmax(-1)
            made.append(ids)
        return torch.cat(made)

    model = Given()
    model.compile(backend="vericache", options=OPTIONS)
    with caplog.at_level("WARNING", logger="vericache_compile"):
        assert torch.equal(decode(model), decode(Given()))
    assert [record.getMessage() for record in caplog.records if "a mask of two axes" in record.getMessage()]


class Counting(nn.Module):
    """The model itself counts what it has seen, and computes its mask from that."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Given()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, Given.heads, COLUMNS, Given.size), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [1, T] that follow those seen; logits [1, T, V]."""
        at = torch.arange(ids.shape[1]) + self.seen
        shown = torch.arange(COLUMNS) <= at[:, None]
        self.seen.add_(ids.shape[1])
        return self.inner(ids, self.keys, self.values, at, shown[None, None], at[None])


def test_a_model_that_counts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its count is another in each call, and is no reason to plan anew."""
    from vericache_compile import backend

    planned = []
    original = backend.plan_capture
    monkeypatch.setattr(backend, "plan_capture", lambda *given: planned.append(1) or original(*given))

    @torch.no_grad()
    def decode(model: nn.Module) -> Tensor:
        ids, tokens = prompt(20), []
        for _ in range(20):
            ids = model(ids)[:, -1:].argmax(-1)
            tokens.append(ids)
        return torch.cat(tokens, dim=1)

    model = Counting()
    model.compile(backend="vericache", options=OPTIONS)
    assert torch.equal(decode(model), decode(Counting()))
    assert int(model.seen) == 39
    assert stats(model)["rounds"] > 0
    assert len(planned) <= 4
