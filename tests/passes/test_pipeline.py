"""The passes in order: plans, what a second capture costs, and the numbers of real models."""

from __future__ import annotations

import logging

import pytest
import torch
from graphs import PASSES, Toy, run_segmented, run_until, run_variant, take_steps, tiny_decode, toy_decode
from torch import Tensor

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes import pipeline
from vericache_compile.passes.pipeline import plan_capture
from vericache_compile.passes.program import Program, copy_module
from vericache_compile.plan import CapturedPlan, Compiled, DecodePlan

MODELS = ["llama", "qwen3", "gpt2"]
ROWS = {"atol": 1e-4, "rtol": 1e-4}


def test_each_pass_is_run_once_in_order_and_says_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger=pipeline.__name__):
        plan = plan_capture(tiny_decode("llama", 1).module, 1, 4, False, {})
    names = [getattr(each, "func", each).__name__ for each in PASSES]
    said = [record.args for record in caplog.records if record.name == pipeline.__name__]
    assert [name for name, _ in said] == names
    assert dict(said)["find_attention"] == 3
    assert isinstance(plan, DecodePlan)


def test_a_decode_step_gets_a_plan_for_draft_and_verify() -> None:
    plan = plan_capture(tiny_decode("gpt2", 3).module, 3, 8, False, {})
    assert isinstance(plan, DecodePlan)
    assert (plan.window, plan.logits, plan.position_rule, plan.position_limit) == (8, 0, "given", 4096)
    assert (plan.draft.mode, plan.verify.mode) == ("draft", "verify")
    assert plan.captured.attends_to_past
    assert [site.layer for site in plan.captured.sites] == [0, 1, 2]


def test_a_step_over_a_past_of_one_length_runs_as_captured() -> None:
    plan = plan_capture(toy_decode(Toy(), dynamic=False).module, 1, 4, False, {})
    assert isinstance(plan, CapturedPlan)
    assert plan.attends_to_past


def test_a_refused_graph_is_left_as_it_was() -> None:
    class Doubled(Toy):
        def positions(self, ids: Tensor, past: Tensor, *more: Tensor) -> Tensor:
            return super().positions(ids, past) + past.shape[2]

    module = toy_decode(Doubled()).module
    before = module.print_readable(False)
    with pytest.raises(UnsupportedGraph):
        plan_capture(module, 1, 4, False, {})
    assert module.print_readable(False) == before


@pytest.mark.parametrize(("name", "batch"), [("llama", 1), pytest.param("gpt2", 3, marks=pytest.mark.slow)])
def test_a_capture_with_another_prompt_compiles_nothing(name: str, batch: int) -> None:
    compiled: dict[str, Compiled] = {}
    plan_capture(tiny_decode(name, batch).module, batch, 4, False, compiled)
    known = set(compiled)
    assert len(known) == 6
    plan_capture(tiny_decode(name, batch, tokens=12).module, batch, 4, False, compiled)
    assert set(compiled) == known


def test_another_window_compiles_verify_only() -> None:
    compiled: dict[str, Compiled] = {}
    module = tiny_decode("llama", 1).module
    plan_capture(module, 1, 4, False, compiled)
    plan_capture(module, 1, 8, False, compiled)
    assert len(compiled) == 9


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", MODELS)
def test_the_canonical_step_gives_the_rows_of_the_captured_one(name: str, batch: int) -> None:
    captured = tiny_decode(name, batch)
    program = run_until(captured, "split_modes", batch=batch)
    steps = take_steps(program, captured, 1)
    assert steps.pads.tolist() == [0, 1, 3][:batch]
    for mode in ("draft", "verify"):
        made = run_variant(program, mode, captured, steps, 0)
        torch.testing.assert_close(made, steps.rows[0], **ROWS)


@pytest.mark.parametrize("window", [2, 4, 16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_verify_gives_the_rows_of_one_token_steps(name: str, batch: int, window: int) -> None:
    captured = tiny_decode(name, batch)
    program = run_until(captured, "lower", batch=batch, window=window)
    steps = take_steps(program, captured, window)
    expected = tuple(torch.stack(rows) for rows in zip(*steps.rows, strict=True))
    for run in (run_variant, run_segmented):
        torch.testing.assert_close(run(program, "verify", captured, steps, window), expected, **ROWS)
        [token] = run(program, "draft", captured, steps, 0)
        assert torch.equal(token, expected[program.logits][0].argmax(-1))


def test_a_program_leaves_the_captured_graph_alone() -> None:
    captured = tiny_decode("llama", 3)
    before = captured.module.print_readable(False)
    run_until(captured, "lower", batch=3)
    assert captured.module.print_readable(False) == before
    assert Program(copy_module(captured.module), 3, 4).placeholders[0] not in captured.module.graph.nodes
