"""A write in place is taken where it puts one token at the column of its length, and only then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import Captured, Toy, capture, run_until
from looked_up import LookedUp, index_copy, index_put, set_item
from torch import Tensor

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.find_writes import find_write


class Buffered(Toy):
    """Keeps its cache in buffers of a fixed size, under a mask that the caller gives."""

    def positions(self, ids: Tensor, past: Tensor, *more: Any) -> Tensor:
        return more[2]

    def write(self, buffer: Tensor, new: Tensor, counter: Tensor) -> None:
        buffer.index_copy_(2, torch.arange(1) + counter, new)

    def count(self, counter: Tensor) -> None:
        counter.add_(1)

    def forward(self, ids: Tensor, k: Tensor, v: Tensor, *more: Any) -> Any:
        counter, shown, positions = more
        x = self.embed(ids) + self.place(positions)
        q, new_k, new_v = self.project(x)
        self.write(k, new_k, counter)
        self.write(v, new_v, counter)
        self.count(counter)
        x = x + F.scaled_dot_product_attention(q, k, v, shown, enable_gqa=True).transpose(1, 2).flatten(2)
        return self.to_logits(x)


def step(model: Buffered, columns: int = 6, room: int = 20) -> Captured:
    """One decode step with `columns` cached."""
    k, v = torch.randn(2, 1, model.kv_heads, room, model.size, generator=torch.Generator().manual_seed(1))
    shown = (torch.arange(room) <= columns)[None, None, None]
    given = (torch.tensor([[3]]), k, v, torch.tensor(columns), shown, torch.tensor([[columns]]))
    return capture(model, lambda model: model(*given))[-1]


def test_buffers_counters_and_mask_get_roles() -> None:
    program = run_until(step(Buffered()), "split_modes")
    roles, names = program.found_roles, [node.name for node in program.placeholders]
    assert [names[i] for i in roles.counters] == [names[i] for i in roles.counted] == ["l_more_0_"]
    assert names[roles.shown or 0] == "l_more_1_"
    assert program.sites[0].site.in_place
    assert [find_write(program.placeholders[i]).new for i in program.sites[0].site.past] == [
        program.sites[0].key,
        program.sites[0].value,
    ]
    for variant in program.variants.values():
        targets = [str(node.target) for node in variant.graph.nodes]
        assert not any("index_copy_" in target or target == "add_" for target in targets)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("spell", [index_copy, set_item, index_put])
def test_a_column_that_the_caller_sets_is_also_the_position(spell: Callable[..., object], batch: int) -> None:
    model = LookedUp(spell)
    program = model.program("expand_window", batch)
    names = [node.name for node in program.placeholders]
    assert [names[i] for i in program.found_roles.counters] == ["l_input_pos_"]
    assert program.found_roles.counted == ()
    assert program.found_roles.shown is None
    assert program.position_rule == "column"
    assert program.position_limit == model.columns
    assert program.in_step == (batch > 1)


class Ahead(Buffered):
    """Writes one column too far."""

    def write(self, buffer: Tensor, new: Tensor, counter: Tensor) -> None:
        buffer.index_copy_(2, torch.arange(1) + counter + 1, new)


class Early(Buffered):
    """Counts values up before they are written."""

    def write(self, buffer: Tensor, new: Tensor, counter: Tensor) -> None:
        super().write(buffer, new, counter)
        counter.add_(1)

    def count(self, counter: Tensor) -> None:
        """Has been."""


class Twice(Buffered):
    """Writes each buffer twice."""

    def write(self, buffer: Tensor, new: Tensor, counter: Tensor) -> None:
        super().write(buffer, new, counter)
        buffer.mul_(2)


class Repeating(Buffered):
    """Writes what one head has to all heads."""

    def write(self, buffer: Tensor, new: Tensor, counter: Tensor) -> None:
        buffer[:, :, torch.arange(1) + counter] = new[:, :1]


class Behind(Buffered):
    """Attends to values of the time before it writes them."""

    def write(self, buffer: Tensor, new: Tensor, counter: Tensor) -> None:
        before = buffer[:, :, -1:]
        super().write(buffer, new, counter)
        new.add_(before)


class Ring(Buffered):
    """Writes around in a ring that is one shorter than its buffer."""

    def write(self, buffer: Tensor, new: Tensor, counter: Tensor) -> None:
        buffer.index_copy_(2, (torch.arange(1) + counter) % (buffer.shape[2] - 1), new)


class Skipping(Buffered):
    """Counts in steps of two."""

    def count(self, counter: Tensor) -> None:
        counter.add_(2)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (Ahead, "at a column that is not its length"),
        (Early, "at a column that is not its length"),
        (Ring, "at a column that is not its length"),
        (Twice, "not by one write of columns"),
        (Repeating, "not by one write of columns"),
        (Behind, "read before it is updated"),
        (Skipping, "not counted up by the tokens of a call"),
    ],
)
def test_other_writes_are_refused(model: type[Buffered], found: str) -> None:
    with pytest.raises(UnsupportedGraph, match=found):
        run_until(step(model()), "find_attention")
