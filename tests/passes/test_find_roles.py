"""Inputs are recognised by what they are read for, not by their names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import Toy, capture, run_until, tiny_decode, toy_decode
from torch import Tensor, nn

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.find_roles import find_roles


@pytest.mark.parametrize(
    ("loop", "positions", "mask"),
    [("generate", "position_ids", "attention_mask"), ("plain", None, None), ("masked", None, "attention_mask")],
)
def test_roles_of_a_decode_step(loop: str, positions: str | None, mask: str | None) -> None:
    program = run_until(tiny_decode("gpt2", 3, loop), "find_roles", batch=3)
    roles, inputs = program.found_roles, program.placeholders

    def name(index: int | None) -> str | None:
        return None if index is None else inputs[index].name

    assert (roles.batch, roles.tokens_per_call) == (3, 1)
    assert name(roles.tokens) == "l_kwargs_input_ids_"
    assert name(roles.positions) == (positions and f"l_kwargs_{positions}_")
    assert name(roles.mask) == (mask and f"l_kwargs_{mask}_")
    held = {i for i, node in enumerate(inputs) if "_parameters_" in node.name or "_buffers_" in node.name}
    assert set(roles.weights) == held


def test_tokens_are_not_what_indexes_another_embedding() -> None:
    class Swapped(Toy):
        def positions(self, ids: Tensor, past: Tensor, *more: Tensor) -> Tensor:
            return more[0]

        def forward(self, places: Tensor, ids: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            return super().forward(ids, k, v, places)

    model = Swapped()
    k, v = torch.randn(2, 1, 2, 6, 8)
    [call] = capture(model, lambda model: model(torch.tensor([[6]]), torch.tensor([[3]]), k, v))
    program = run_until(call, "find_roles")
    names = [program.placeholders[i].name for i in (program.found_roles.positions, program.found_roles.tokens)]
    assert names == ["l_places_", "l_ids_"]


def test_a_prefill_has_as_many_tokens_as_it_was_called_with() -> None:
    model, ids = Toy(), torch.randint(Toy.vocabulary, (1, 5))
    k, v = torch.randn(2, 1, 2, 6, 8)
    [call] = capture(model, lambda model: model(ids, k, v))
    assert run_until(call, "find_roles").found_roles.tokens_per_call == 5
    torch._dynamo.mark_dynamic(ids, 1)
    [call] = capture(model, lambda model: model(ids, k, v))
    assert run_until(call, "find_roles").found_roles.tokens_per_call is None


def test_finding_roles_again_finds_the_same() -> None:
    program = run_until(tiny_decode("llama", 3), "find_roles", batch=3)
    first = program.roles
    find_roles(program)
    assert program.roles == first


class Embedded(Toy):
    """Takes embeddings in place of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Identity()


class Typed(Toy):
    """Takes token types, which index the embedding of the tokens."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return self.to_logits(x + self.embed(more[-1]))


class TwoPositions(Toy):
    """Takes positions and token types, each with an embedding of its own."""

    def positions(self, ids: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return more[0]

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return self.to_logits(x + self.place(more[1]))


class TwoMasks(Toy):
    """Takes two padding masks."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        mask = (more[0] != 0) & (more[1] != 0)
        return F.scaled_dot_product_attention(q, k, v, mask[:, None, None], enable_gqa=True)


class Softmax(Toy):
    """Reads its probabilities for more than the values."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        shares = (q @ k.mT).softmax(-1)
        return shares @ v + shares.amax()


NO_ATTENTION = "a softmax that is not read as attention, and no scaled_dot_product_attention call"
ONE, MASK = torch.tensor([[1]]), torch.ones(1, 7, dtype=torch.int64)
REFUSED = [
    (Typed, (ONE,), "two inputs that may both be the tokens", "self.embed(more[-1])"),
    (TwoPositions, (ONE, ONE.clone()), "a second position input", "self.place(more[1])"),
    (TwoMasks, (MASK, MASK.clone()), "a second padding mask", "mask = ("),
    (Softmax, (), NO_ATTENTION, "softmax(-1)"),
]


@pytest.mark.parametrize(("model", "more", "found", "line"), REFUSED)
def test_a_graph_is_refused_with_its_reason_and_source_line(
    model: type[Toy], more: tuple[Tensor, ...], found: str, line: str
) -> None:
    with pytest.raises(UnsupportedGraph) as error:
        run_until(toy_decode(model(), *more), "find_roles")
    assert error.value.found == found
    assert line in error.value.where


def test_embeddings_in_place_of_tokens_are_refused() -> None:
    with pytest.raises(UnsupportedGraph, match=r"no input of token ids(.|\n)*inputs_embeds is not taken"):
        run_until(toy_decode(Embedded(), ids=torch.randn(1, 1, 32)), "find_roles")
