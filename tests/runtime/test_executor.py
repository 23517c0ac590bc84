"""The executor walks a segmented program: segments in order, attention between them, nothing kept too long."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from vericache_compile.kernels.int8_linear import quantize
from vericache_compile.plan import Act, Cast, SegmentedProgram, Step
from vericache_compile.runtime.executor import WeightCasts, bind_weights, execute

BFLOAT16 = Cast(torch.bfloat16)
TOKENS, POSITIONS, WEIGHT, Q, K, V, OUT, ROWS, NEXT = range(9)


def embed(inputs: list[Tensor]) -> Sequence[Tensor]:
    """Queries, keys and values [1, 1, 1, 2] from a token, its position and a weight."""
    tokens, positions, weight = inputs
    x = torch.stack([tokens, positions], dim=-1).float()[None] * weight
    return x, x + 1, x + 2


def project(inputs: list[Tensor]) -> Sequence[Tensor]:
    """Rows and the next token."""
    (out,) = inputs
    return out * 10, out.sum().long().view(1, 1)


def make_program(cast: Cast | None = None) -> SegmentedProgram:
    steps = (
        Step(Act.RUN, embed, (TOKENS, POSITIONS, WEIGHT), (Q, K, V), dead=(TOKENS, POSITIONS, WEIGHT)),
        Step(Act.ATTEND, None, (Q, K, V), (OUT,), dead=(Q, K, V), layer=3),
        Step(Act.RUN, project, (OUT,), (ROWS, NEXT), dead=(OUT,)),
    )
    return SegmentedProgram("draft", steps, 9, TOKENS, POSITIONS, ((WEIGHT, 5, cast),), (NEXT, ROWS), 2)


def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    assert layer == 3
    assert sinks is None
    return q * 100 + k * 10 + v


def run(program: SegmentedProgram, bound: list[Tensor | None], token: int, position: int) -> tuple[Tensor, ...]:
    return execute(program, bound, torch.tensor([[token]]), torch.tensor([[position]]), attend)


def test_weights_are_bound_to_their_slots() -> None:
    weight = torch.tensor(2.0)
    inputs = [torch.empty(0)] * 5 + [weight]
    bound = bind_weights(make_program(), inputs, WeightCasts())
    assert len(bound) == 9
    assert bound[WEIGHT] is weight
    assert [i for i, slot in enumerate(bound) if slot is not None] == [WEIGHT]


def test_outputs_come_in_the_programs_order() -> None:
    bound = bind_weights(make_program(), [torch.tensor(2.0)] * 6, WeightCasts())
    following, rows = run(make_program(), bound, 3, 4)
    x = torch.tensor([6.0, 8.0])
    expected = x * 100 + (x + 1) * 10 + x + 2
    assert rows.flatten().tolist() == (expected * 10).tolist()
    assert following.item() == int(expected.sum())


def test_bound_weights_serve_many_runs() -> None:
    """Slots that a run frees are those of its own copy."""
    bound = bind_weights(make_program(), [torch.tensor(2.0)] * 6, WeightCasts())
    first = run(make_program(), bound, 3, 4)
    assert bound[WEIGHT] is not None
    assert run(make_program(), bound, 1, 1)[0] != first[0]
    assert torch.equal(run(make_program(), bound, 3, 4)[0], first[0])


def test_dead_values_are_freed_as_the_program_runs() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[list[bool]] = []

    def step(inputs: list[Tensor]) -> Sequence[Tensor]:
        alive.append([held() is not None for held in made])
        out = inputs[0] + 1
        made.append(weakref.ref(out))
        return (out,)

    steps = tuple(Step(Act.RUN, step, (i,), (i + 1,), dead=(i,) if i else ()) for i in range(4))
    program = SegmentedProgram("draft", steps, 6, 0, 5, (), (4,), 1)
    (out,) = execute(program, [None] * 6, torch.zeros(1, 1), torch.zeros(1, 1), attend)
    assert out.item() == 4
    assert alive == [[], [True], [False, True], [False, False, True]]


def test_a_step_must_make_what_it_says() -> None:
    steps = (Step(Act.RUN, lambda inputs: (inputs[0],), (0,), (1, 2), dead=()),)
    program = SegmentedProgram("draft", steps, 4, 0, 3, (), (1,), 1)
    with pytest.raises(ValueError, match="zip"):
        execute(program, [None] * 4, torch.zeros(1, 1), torch.zeros(1, 1), attend)


def test_a_freed_output_is_noticed() -> None:
    steps = (Step(Act.RUN, lambda inputs: (inputs[0],), (0,), (1,), dead=(1,)),)
    program = SegmentedProgram("draft", steps, 4, 0, 3, (), (1,), 1)
    with pytest.raises(AssertionError, match="freed"):
        execute(program, [None] * 4, torch.zeros(1, 1), torch.zeros(1, 1), attend)


def test_draft_may_read_weights_in_another_type() -> None:
    casts, weight = WeightCasts(), torch.tensor([2.5, 1.0])
    bound = bind_weights(make_program(BFLOAT16), [weight] * 6, casts)[WEIGHT]
    assert bound is not None
    assert bound.dtype == torch.bfloat16
    assert bound.tolist() == [2.5, 1.0]
    assert bind_weights(make_program(BFLOAT16), [weight] * 6, casts)[WEIGHT] is bound
    assert bind_weights(make_program(), [weight] * 6, casts)[WEIGHT] is weight
    assert casts.nbytes == 4


def test_a_weight_changed_in_place_is_cast_again() -> None:
    casts, weight = WeightCasts(), torch.tensor([2.5, 1.0])
    first = casts.get(weight, BFLOAT16)
    weight.mul_(2)
    assert casts.get(weight, BFLOAT16).tolist() == [5.0, 2.0]
    assert first.tolist() == [2.5, 1.0]
    assert casts.nbytes == 4, "the outdated copy is gone"
    assert casts.get(weight, Cast(torch.float16)).dtype == torch.float16


def test_weights_that_begin_at_one_address_are_cast_apart() -> None:
    """A fused weight and its first part."""
    casts, weight = WeightCasts(), torch.arange(6.0)
    whole, part = casts.get(weight, BFLOAT16), casts.get(weight[:2], BFLOAT16)
    assert (whole.shape, part.shape) == ((6,), (2,))
    assert casts.get(weight, BFLOAT16) is whole


def test_weights_of_inference_mode_are_cast() -> None:
    with torch.inference_mode():
        weight = torch.ones(3)
        copy = WeightCasts().get(weight, BFLOAT16)
    assert copy.dtype == torch.bfloat16


@pytest.mark.parametrize("turned", [False, True])
def test_int8_copies_are_codes_and_scales(turned: bool) -> None:
    weight = torch.randn(5, 40)
    casts, held = WeightCasts(), weight.t().contiguous() if turned else weight
    codes = casts.get(held, Cast(torch.int8, turned))
    scales = casts.get(held, Cast(torch.int8, turned, scale=True))
    assert all(torch.equal(*pair) for pair in zip((codes, scales), quantize(weight), strict=True))
    assert casts.get(held, Cast(torch.int8, turned)) is codes
    assert casts.nbytes == codes.nbytes + scales.nbytes


def test_copies_of_turned_weights_lie_as_products_read_them() -> None:
    weight = torch.randn(6, 4)
    copy = WeightCasts().get(weight, Cast(torch.bfloat16, turned=True))
    assert torch.equal(copy, weight.t().to(torch.bfloat16))
    assert copy.is_contiguous()
