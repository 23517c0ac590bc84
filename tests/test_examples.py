"""Examples run, and models of one's own that the backend does not take say why and are right all the same."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vericache_compile import stats

UNMASKED = "a cache updated in place under no mask"
BLOCKED = "FlexAttention of one token under a block mask"
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["plain_pytorch", "fixed_buffers"])
def test_models_of_ones_own_give_identical_tokens(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VERICACHE_INDUCTOR", "0")
    example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert example["main"](["--tokens", "70", "--count", "24", "--width", "64"]) == 0
    assert "yes" in capsys.readouterr().out


def test_rows_of_a_batch_whose_positions_are_one_vector_advance_in_step() -> None:
    example = runpy.run_path(str(EXAMPLES / "plain_pytorch.py"))
    torch.manual_seed(0)
    model, ids = example["Decoder"](50, 64, heads=4, layers=2, places=80).eval(), torch.randint(50, (3, 40))
    plain = example["decode"](model, ids, 40)
    model.compile(backend="vericache", options={"inductor": False, "window": 8, "compressor": "none", "strict": True})
    assert torch.equal(example["decode"](model, ids, 40), plain)
    assert stats(model)["rounds"] > 0


class Unmasked(nn.Module):
    """One attention over buffers of a fixed size, written in place at `input_pos`, all of which each token sees."""

    heads, size, columns, vocabulary = 2, 16, 64, 31

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = self.heads * self.size
        self.embed, self.place = nn.Embedding(self.vocabulary, width), nn.Embedding(self.columns, width)
        self.to_qkv, self.to_logits = nn.Linear(width, 3 * width), nn.Linear(width, self.vocabulary)
        shape = (1, self.heads, self.columns, self.size)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(shape), persistent=False)

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(input_pos)
        q, k, v = self.to_qkv(x).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        self.keys[:, :, input_pos], self.values[:, :, input_pos] = k, v
        out = self.attend(q, input_pos)
        return self.to_logits(x + out.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, input_pos: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, self.keys, self.values)


class Flexible(Unmasked):
    """The same by FlexAttention with a block mask for each token."""

    def attend(self, q: Tensor, input_pos: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        first = input_pos[0]

        def causal(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return column <= first + row

        mask = create_block_mask(causal, None, None, q.shape[2], self.columns, device="cpu")
        out: Any = flex_attention(q, self.keys, self.values, block_mask=mask)
        return out


@torch.no_grad()
def decode(model: Any, ids: Tensor, count: int) -> Tensor:
    """`count` greedy tokens after ids [1, T]."""
    positions, tokens = torch.arange(ids.shape[1]), []
    for _ in range(count):
        ids = model(ids, positions)[:, -1:].argmax(-1)
        tokens.append(ids)
        positions = positions[-1:] + 1
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize(("model", "reason"), [(Unmasked, UNMASKED), (Flexible, BLOCKED)])
def test_what_is_not_taken_says_why_and_is_right(
    model: type[Unmasked], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    plain, compiled = decode(model(), ids, 12), model()
    compiled.compile(backend="vericache", options={"inductor": False})
    with caplog.at_level("WARNING", logger="vericache_compile"):
        assert torch.equal(decode(compiled, ids, 12), plain)
    assert stats(compiled)["not_taken"] == [reason]
    [said] = [record.getMessage() for record in caplog.records if reason in record.getMessage()]
    assert "where:" in said
    assert "fix:" in said
