"""A position is recognised by its value, and every use of the past length must come from one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import Toy, run_until, tiny_decode, toy_decode
from torch import Tensor

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.lift_positions import lift_positions


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    ("loop", "rule"),
    [("generate", "given"), ("plain", "column"), pytest.param("masked", "column", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("name", "limit"), [("llama", None), pytest.param("gpt2", 4096, marks=pytest.mark.slow)])
def test_the_rule_of_real_models(name: str, limit: int | None, loop: str, rule: str, batch: int) -> None:
    program = run_until(tiny_decode(name, batch, loop), "prove_mask", batch=batch)
    assert lift_positions(program) == lift_positions(program) == 1
    assert (program.position_rule, program.position_limit) == (rule, limit)
    [node] = program.position_nodes
    assert node.meta["example_value"].dim() == 2, "positions enter as [B, 1] whatever the rule"


class Offset(Toy):
    """Learned positions begin in the third row (OPT)."""

    def positions(self, ids: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return (torch.arange(ids.shape[1]) + past.shape[2])[None] + 2


class Flat(Toy):
    """One-dimensional positions."""

    def positions(self, ids: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return torch.arange(past.shape[2], past.shape[2] + ids.shape[1])


class Clamped(Toy):
    """Positions that stop at the last row of the table."""

    def positions(self, ids: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return super().positions(ids, past).clamp(max=self.places - 1)


class Nowhere(Toy):
    """No positions at all."""

    def positions(self, ids: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.int64)


class Padded(Toy):
    """Positions count the columns of the padding mask [B, S + 1] that are shown."""

    def positions(self, ids: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return (more[0].cumsum(-1) - 1)[:, -1:]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        mask = (more[0] != 0)[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


@pytest.mark.parametrize(
    ("model", "rule", "limit", "nodes"),
    [
        (Toy, "column", 600, 1),
        (Offset, "column", 598, 1),
        (Flat, "column", 600, 1),
        (Clamped, "column", None, 1),
        (Nowhere, "column", None, 0),
    ],
)
def test_positions_computed_from_the_past_length(model: type[Toy], rule: str, limit: int | None, nodes: int) -> None:
    program = run_until(toy_decode(model()), "lift_positions")
    assert (program.position_rule, program.position_limit) == (rule, limit)
    assert len(program.position_nodes) == nodes


@pytest.mark.parametrize("batch", [1, 3])
def test_positions_computed_from_the_padding(batch: int) -> None:
    padding = torch.ones(batch, 7, dtype=torch.int64)
    program = run_until(toy_decode(Padded(), padding, batch=batch), "lift_positions", batch=batch)
    assert (program.position_rule, program.position_limit) == ("unpadded", 600)


class Doubled(Toy):
    """Every second position."""

    def positions(self, ids: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return (torch.arange(ids.shape[1]) + 2 * past.shape[2])[None]


class Wrapped(Toy):
    """Positions that begin again where no short cache reaches."""

    def positions(self, ids: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return (torch.arange(ids.shape[1]) + past.shape[2] % 5000)[None]


class InPlace(Toy):
    """Positions made by changing a tensor."""

    def positions(self, ids: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        made = torch.zeros(1, 1, dtype=torch.int64)
        made.add_(past.shape[2])
        return made


class Counted(Padded):
    """How many columns are shown is not a position."""

    def positions(self, ids: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return more[0].sum(-1, keepdim=True)


class Twice(Toy):
    """Uses given positions and the past length."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return self.to_logits(x + self.place(more[0]))


NOT_ONE = "a value computed from the past length that is not a position"
PADDING = torch.ones(1, 7, dtype=torch.int64)
REFUSED = [
    (Doubled, (), NOT_ONE, "2 * past.shape[2]"),
    (Wrapped, (), NOT_ONE, "past.shape[2] % 5000"),
    (InPlace, (), "an in-place change of a mask or position", "made.add_"),
    (Counted, (PADDING,), NOT_ONE, "more[0].sum"),
    (Twice, (PADDING[:, :1],), "a value computed from the past length beside given positions", "past.shape[2]"),
]


@pytest.mark.parametrize(("model", "more", "found", "line"), REFUSED)
def test_a_graph_is_refused_with_its_reason_and_source_line(
    model: type[Toy], more: tuple[Tensor, ...], found: str, line: str
) -> None:
    with pytest.raises(UnsupportedGraph) as error:
        run_until(toy_decode(model(), *more), "lift_positions")
    assert error.value.found == found
    assert line in error.value.where
