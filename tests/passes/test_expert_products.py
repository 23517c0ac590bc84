"""Experts that tokens choose: one operator for a whole window, whichever way a model writes them."""

from __future__ import annotations

import pytest
import torch
from graphs import Toy, run_until, run_variant, take_steps, toy_decode
from torch import Tensor, nn

from vericache_compile import ops
from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.expand_window import expand_window, find_gemms
from vericache_compile.passes.expert_products import ExpertProducts

EXPERTS, CHOSEN = 5, 2


class Experts(Toy):
    """Two of five experts per token; tests override how their products are written."""

    def __init__(self) -> None:
        super().__init__()
        width = self.heads * self.size
        self.router = nn.Linear(width, EXPERTS)
        self.experts = nn.Parameter(torch.randn(EXPERTS, width, width) / width**0.5)

    def multiply(self, x: Tensor, experts: Tensor) -> Tensor:
        """Rows x [S, in] by the weights of their experts [S]."""
        return torch.bmm(self.experts[experts], x.unsqueeze(-1)).squeeze(-1)

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        flat = x.reshape(-1, width)
        share, chosen = self.router(flat).softmax(-1).topk(CHOSEN)
        made = self.multiply(flat.repeat_interleave(CHOSEN, dim=0), chosen.reshape(-1))
        made = (made * share.reshape(-1, 1)).view(-1, CHOSEN, width).sum(1)
        return self.to_logits(x + made.view(batch, tokens, width))


class Turned(Experts):
    """x from the left."""

    def multiply(self, x: Tensor, experts: Tensor) -> Tensor:
        return torch.bmm(x.unsqueeze(1), self.experts[experts]).squeeze(1)


class Grouped(Experts):
    """Sorted by expert, then a grouped product."""

    def multiply(self, x: Tensor, experts: Tensor) -> Tensor:
        from transformers.integrations.moe import _grouped_linear

        ordered, order = torch.sort(experts)
        counts = torch.histc(ordered.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        made = _grouped_linear(x[order], self.experts, offsets)
        return made[torch.argsort(order)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model", [Experts, Turned, Grouped])
def test_a_window_is_one_product_and_gives_the_rows_of_single_steps(model: type[Toy], batch: int) -> None:
    call = toy_decode(model(), batch=batch)
    program = run_until(call, "expand_window", batch=batch, window=8)
    for mode in ("draft", "verify"):
        names = [node.target._opname for node in find_gemms(program.variants[mode])]
        assert sorted(names) == ["experts_mm"] + ["linear"] * 4, mode
    steps = take_steps(program, call, 8)
    [made] = run_variant(program, "verify", call, steps, 8)
    expected = torch.stack([row for (row,) in steps.rows])
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_product_with_experts_is_left_alone() -> None:
    spell = ExpertProducts().spell
    x = torch.zeros(2, 3, 4)
    assert spell(torch.bmm, (x, x.mT), {}) is None
    assert spell(torch.histc, (torch.zeros(3), 4, 0, 9), {}) is None
    assert spell(torch.add, (x, x), {}) is None


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((8,), {}), ((), {"bins": 8}), ((), {"bins": 8, "min": 0, "max": 9}), ((8, 0, 7), {"out": None})],
)
def test_other_counts_are_left_alone(args: tuple[int, ...], kwargs: dict[str, int]) -> None:
    assert ExpertProducts().spell(torch.histc, (torch.zeros(3), *args), kwargs) is None


def test_products_in_other_forms_are_left_alone() -> None:
    spell, x = ExpertProducts().spell, torch.zeros(2, 3, 4)
    assert spell(torch.bmm, (), {"input": x, "mat2": x.mT}) is None
    assert spell(torch._grouped_mm, (x, x.mT), {}) is None
    assert spell(torch._grouped_mm, (x, x.mT), {"out_dtype": torch.float32}) is None
    offsets = torch.tensor([1, 3], dtype=torch.int32)
    assert spell(torch._grouped_mm, (x[0], x.mT, offsets), {"bias": x[0]}) is None


def test_a_call_of_a_wrong_type_is_refused_with_its_line() -> None:
    class Wrong(Toy):
        def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
            return self.to_logits(x)

    program = run_until(toy_decode(Wrong()), "split_modes")
    call = next(node for node in program.variants["draft"].graph.nodes if node.target is torch.nn.functional.linear)
    call.args = (call.args[0], 3)
    with pytest.raises(UnsupportedGraph, match="a call that a window cannot be put through"):
        expand_window(program)


def random_call(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, 24], weights [5, 24, 16] stored as [5, 16, 24], experts [rows]."""
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 24, generator=generator), torch.randn(EXPERTS, 16, 24, generator=generator)
    chosen = torch.randint(0, EXPERTS, (rows,), generator=generator)
    return x.to(dtype), weight.to(dtype).transpose(1, 2), chosen


@pytest.mark.parametrize("rows", [0, 4])
def test_each_row_meets_its_expert(rows: int) -> None:
    x, weight, chosen = random_call(23)
    made = ops.experts_mm(x, weight, chosen, rows)
    torch.testing.assert_close(made, torch.stack([a @ weight[e] for a, e in zip(x, chosen, strict=True)]))
    assert not ops.experts_mm(x, weight, torch.full_like(chosen, EXPERTS), rows).any()
    torch.library.opcheck(ops.experts_mm, (x, weight, chosen, rows), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("stored", ["turned", "straight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_the_choices_of_others(dtype: torch.dtype, stored: str) -> None:
    x, weight, chosen = random_call(40, dtype)
    weight = weight if stored == "turned" else weight.contiguous()
    rows = ops.EXPERT_ROWS
    alone = torch.cat([ops.experts_mm(x[i : i + 1], weight, chosen[i : i + 1], rows) for i in range(40)])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    for count in (1, 2, 7, 15, 16, 17, 33, 40):
        some = order[:count]
        assert torch.equal(ops.experts_mm(x[some], weight, chosen[some], rows), alone[some]), count
    assert torch.equal(ops.experts_mm(x, weight, torch.zeros_like(chosen), rows)[chosen == 0], alone[chosen == 0])


@pytest.mark.parametrize("axis", [0, 1])
def test_a_window_puts_all_rows_to_their_experts_together(axis: int) -> None:
    x, weight, chosen = random_call(24)
    windowed, experts = x.view(4, 6, 24), chosen.view(4, 6)
    made = torch.func.vmap(lambda x, e: ops.experts_mm(x, weight, e, 0), in_dims=(axis, 0))(
        windowed.movedim(0, axis), experts
    )
    assert torch.equal(made.flatten(0, 1), ops.experts_mm(x, weight, chosen, ops.EXPERT_ROWS))
    with pytest.raises(NotImplementedError, match="a weight differs over the window"):
        torch.func.vmap(lambda w: ops.experts_mm(x, w, chosen, 0))(weight[None])


def test_a_program_with_experts_says_that_it_waits_for_the_host() -> None:
    for model, waits in ((Toy(), False), (Experts(), True)):
        program = run_until(toy_decode(model), "lower")
        assert [each.waits_for_host for each in program.segmented.values()] == [waits, waits]
