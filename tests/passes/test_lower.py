"""Segments are compiled once each, and the steps between them hand over slots."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from graphs import Toy, Twin, run_segmented, run_until, take_steps, tiny_decode, toy_decode

from vericache_compile.passes.lower import lower
from vericache_compile.plan import Compiled


def test_steps_are_segments_and_attentions_in_turn() -> None:
    program = run_until(tiny_decode("llama", 1), "lower")
    for mode in ("draft", "verify"):
        segmented = program.segmented[mode]
        assert [step.layer for step in segmented.steps] == [-1, 0, -1, 1, -1, 2, -1]
        assert [step.run is None for step in segmented.steps] == [step.layer >= 0 for step in segmented.steps]
        assert all(len(step.inputs) == 3 and len(step.outputs) == 1 for step in segmented.steps if step.run is None)
        assert segmented.steps[2].run is segmented.steps[4].run, "equal layers run one artefact"
        assert segmented.distinct == 3


def test_only_weights_that_steps_read_are_bound() -> None:
    program = run_until(tiny_decode("llama", 1), "lower")
    for segmented in program.segmented.values():
        indices = [index for _, index, *_ in segmented.weights]
        assert set(indices) <= set(program.found_roles.weights), "no cache tensor takes a slot"
        slots = [slot for slot, *_ in segmented.weights]
        assert len({*slots, segmented.tokens, segmented.positions}) == len(slots) + 2


def test_values_die_after_their_last_use() -> None:
    program = run_until(tiny_decode("llama", 1), "lower")
    for segmented in program.segmented.values():
        read = {slot: i for i, step in enumerate(segmented.steps) for slot in (*step.inputs, *step.outputs)}
        bound = {segmented.tokens, segmented.positions, *(slot for slot, *_ in segmented.weights)}
        dead = {slot: i for i, step in enumerate(segmented.steps) for slot in step.dead}
        assert dead == {slot: i for slot, i in read.items() if slot not in bound | set(segmented.outputs)}


def test_lowering_again_compiles_nothing() -> None:
    program = run_until(tiny_decode("llama", 1), "partition")
    assert lower(program, inductor=False) == 6
    first = program.segmented
    assert lower(program, inductor=False) == 0
    assert program.segmented == first


def test_compiled_and_eager_segments_are_kept_apart() -> None:
    compiled: dict[str, Compiled] = {}
    call = toy_decode(Toy())
    run_until(call, "lower", compiled=compiled)
    assert {key.split(":")[0] for key in compiled} == {"eager"}
    assert len(compiled) == 4


def test_attentions_side_by_side_need_no_step_between_them() -> None:
    call = toy_decode(Twin(), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8))
    program = run_until(call, "lower")
    assert [step.layer for step in program.segmented["draft"].steps] == [-1, 0, 1, -1]
    steps = take_steps(program, call, 4)
    [logits] = run_segmented(program, "verify", call, steps, 4)
    torch.testing.assert_close(logits, torch.stack([rows[0] for rows in steps.rows]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_inductor_gives_what_eager_gives(batch: int) -> None:
    call = toy_decode(Toy(), batch=batch)
    eager, compiled = (run_until(call, "partition", batch=batch) for _ in range(2))
    for program, inductor in ((eager, False), (compiled, True)):
        assert partial(lower, inductor=inductor)(program) == 4
    steps = take_steps(eager, call, 4)
    for mode, window in (("draft", 0), ("verify", 4)):
        [expected], [made] = (run_segmented(p, mode, call, steps, window) for p in (eager, compiled))
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
