"""Families of models: taken, with plain tokens and bits that drafts do not change; and the command that tells."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Switch
from test_canonical import CHOICES, logits_of, random_guess, use_drafter, wrong_guess

from vericache_compile import stats, sweep
from vericache_compile.cli import main
from vericache_compile.passes import pipeline
from vericache_compile.passes.program import Program
from vericache_compile.passes.split_modes import STATE
from vericache_compile.sweep import WINDOW, Finding, try_model
from vericache_compile.sweep_models import HYBRIDS, LAYERS, MODELS, VOCABULARY, attentions_of, make_model

QUICK = {("gpt_oss", "eager"), ("bloom", "eager")}
"""Sinks and experts, ALiBi: what no other quick test generates with."""
EAGERLY = {"inductor": False, "draft_dtype": "same"}
FAMILIES = [
    pytest.param(name, attention, marks=() if (name, attention) in QUICK else pytest.mark.slow)
    for name in MODELS
    if name not in HYBRIDS
    for attention in ("sdpa", "eager")
]


@pytest.mark.parametrize(("name", "attention"), FAMILIES)
def test_a_family_gives_plain_tokens(name: str, attention: str) -> None:
    if attention not in attentions_of(name):
        pytest.skip(f"{name} has no attention implementation {attention}")
    found = try_model(name, attention)
    assert found.identical
    assert (found.taken, found.not_taken, found.sites) == (True, [], LAYERS)
    assert found.tokens_per_round == WINDOW
    assert found.tokens_per_round_snapkv >= 1


@pytest.mark.parametrize("name", [HYBRIDS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in HYBRIDS[1:])])
def test_a_family_with_recurrent_layers_is_left_with_its_reason(name: str) -> None:
    found = try_model(name, attentions_of(name)[0])
    assert (found.taken, found.identical, found.not_taken, found.is_right) == (False, True, [STATE], True)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        pytest.param("gpt_oss", "eager", marks=pytest.mark.slow),
        pytest.param("bloom", "eager", marks=pytest.mark.slow),
        pytest.param("falcon-alibi", "sdpa", marks=pytest.mark.slow),
        pytest.param("mpt", "eager", marks=pytest.mark.slow),
        pytest.param("gemma2", "eager", marks=pytest.mark.slow),
        pytest.param("mixtral", "sdpa", marks=pytest.mark.slow),
        pytest.param("granitemoe", "eager", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "sdpa", marks=pytest.mark.slow),
    ],
)
def test_rows_are_bit_equal_whatever_drafts_do(name: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, switch = make_model(name, attention), Switch()
    model.compile(backend=switch)
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (3, 250), generator=torch.Generator().manual_seed(0))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, :40] = 0
    settings = {"window": 8, "inductor": False}
    first = logits_of(model, switch, inputs, 18, **CHOICES[0], **settings)
    assert torch.equal(first, logits_of(model, switch, inputs, 18, **CHOICES[2], **settings)), "snapkv"
    use_drafter(monkeypatch, random_guess(VOCABULARY))
    assert torch.equal(first, logits_of(model, switch, inputs, 18, **CHOICES[1], **settings)), "random guesses"
    use_drafter(monkeypatch, wrong_guess(VOCABULARY, first))
    assert torch.equal(first, logits_of(model, switch, inputs, 18, **CHOICES[4], **settings)), "wrong guesses"
    assert stats(model)["accepted"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), [("gpt_oss", "eager"), ("bloom", "eager"), ("mixtral", "sdpa")])
def test_a_family_gives_plain_tokens_in_compiled_segments(name: str, attention: str) -> None:
    found = try_model(name, attention, inductor=True)
    assert (found.identical, found.taken, found.tokens_per_round) == (True, True, WINDOW)


def test_batched_experts_give_plain_tokens() -> None:
    torch._dynamo.reset()
    model = make_model("mixtral", "sdpa")
    model.set_experts_implementation("batched_mm")
    prompt = sweep.make_prompt(1)
    plain = model.generate(**prompt, max_new_tokens=17, do_sample=False)
    model.compile(backend="vericache", options={"compressor": "none", "window": 8, **EAGERLY})
    assert torch.equal(model.generate(**prompt, max_new_tokens=17, do_sample=False), plain)
    assert (stats(model)["rounds"], stats(model)["not_taken"]) == (2, [])


def test_drafts_of_a_model_with_alibi_keep_every_token_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model, prompt = make_model("bloom", "eager"), sweep.make_prompt(1)
    model.compile(backend="vericache", options={"compressor": "snapkv(keep=0.2, window=8)", "window": 8, **EAGERLY})
    with caplog.at_level(logging.WARNING, "vericache_compile"):
        for _ in range(2):
            model.generate(**prompt, max_new_tokens=33, do_sample=False)
    [record] = [each for each in caplog.records if "ALiBi" in each.getMessage()]
    assert all(part in record.getMessage() for part in ("where: compressor SnapKV", "fix:"))
    assert stats(model)["tokens_per_round"] == 8, "a draft over every token is not wrong"


def test_a_quantised_draft_of_a_model_with_alibi_needs_no_word(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model, prompt = make_model("bloom", "eager"), sweep.make_prompt(1)
    plain = model.generate(**prompt, max_new_tokens=33, do_sample=False)
    model.compile(backend="vericache", options={"compressor": "int8", "window": 8, **EAGERLY})
    with caplog.at_level(logging.WARNING, "vericache_compile"):
        assert torch.equal(model.generate(**prompt, max_new_tokens=33, do_sample=False), plain)
    assert not caplog.records
    assert stats(model)["tokens_per_round"] > 4


def test_masks_from_buffers_are_proved_for_each_model_of_a_make() -> None:
    """Dynamo runs one graph for both: their masks differ only in what a buffer holds."""
    torch._dynamo.reset()
    prompt = sweep.make_prompt(1)
    for kind in ("global", "local"):
        model = make_model("gpt_neo", "eager", attention_types=[[[kind], LAYERS]])
        plain = model.generate(**prompt, max_new_tokens=17, do_sample=False)
        model.compile(backend="vericache", options={"compressor": "none", "window": 8, **EAGERLY})
        assert torch.equal(model.generate(**prompt, max_new_tokens=17, do_sample=False), plain), kind
        assert stats(model)["rounds"] == 2, kind
        assert stats(model)["not_taken"] == []


def test_a_length_that_the_model_cannot_reach_fails_as_plain_generate_does() -> None:
    torch._dynamo.reset()
    model = make_model("mpt", "eager", max_seq_len=64)
    prompt = sweep.make_prompt(1)
    plain = model.generate(**prompt, max_new_tokens=17, do_sample=False)
    model.compile(backend="vericache", options={"compressor": "none", "window": 8, **EAGERLY})
    assert torch.equal(model.generate(**prompt, max_new_tokens=17, do_sample=False), plain)
    assert stats(model)["rounds"] > 0
    model._compiled_call_impl = None
    with pytest.raises(RuntimeError):
        model.generate(**prompt, max_new_tokens=18, do_sample=False)
    model.compile(backend="vericache", options={"compressor": "none", "window": 8, **EAGERLY})
    with pytest.raises(RuntimeError):
        model.generate(**prompt, max_new_tokens=18, do_sample=False)


FOUND = {
    "opt": Finding("opt", "sdpa", sites=2, tokens_per_round=8.0, tokens_per_round_snapkv=1.5),
    "mpt": Finding("mpt", "eager", taken=False, not_taken=["a | b", "c"]),
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command without its models."""
    monkeypatch.setattr(sweep, "attentions_of", lambda name: ("eager",))
    monkeypatch.setattr(sweep, "try_model", lambda name, attention, inductor: FOUND[name])
    monkeypatch.setenv("COLUMNS", "140")


@pytest.mark.usefixtures("told")
def test_the_command_prints_json_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--json", "opt", "mpt"]) == 1, "mpt is not taken"
    out, err = capsys.readouterr()
    opt, mpt = json.loads(out)["models"]
    assert (opt["name"], opt["attention"], opt["layers"], opt["sites"], opt["reason"]) == ("opt", "sdpa", 2, 2, None)
    assert (opt["taken"], opt["checks"], opt["identical"], opt["tokens_per_round"]) == (True, "passed", True, 8.0)
    assert (mpt["taken"], mpt["reason"]) == (False, "a | b; c")
    assert "trying small models: mpt, eager (2 of 2)" in err


@pytest.mark.usefixtures("told")
def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "models.md"
    assert main(["sweep", "--markdown", str(page), "opt", "mpt"]) == 1
    assert "| opt | sdpa | 2 / 2 | yes | passed | yes | 8.0 | 1.5 |  |" in page.read_text()
    assert "| mpt | eager | 0 / 2 | no | passed | yes |  |  | a \\| b; c |" in page.read_text()
    assert "2 / 2" in capsys.readouterr().out


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("wrong", [{"identical": False}, {"tokens_per_round": 7.5}, {"taken": False}])
def test_a_wrong_token_or_draft_is_exit_code_1(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["sweep", "opt"]) == 0
    monkeypatch.setitem(FOUND, "opt", replace(FOUND["opt"], **wrong))
    assert main(["sweep", "opt"]) == 1


def test_a_check_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(program: Program, after: str) -> None:
        raise AssertionError(f"after {after}: no good")

    monkeypatch.setattr(pipeline, "check", fail)
    found = try_model("llama", "sdpa")
    assert (found.taken, found.identical) == (False, False)
    assert found.checks == "after bind_scalars: no good"
    assert not found.is_right


def test_an_unknown_name_is_said_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "lama"]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in ("no small model named 'lama'", "where:", "fix:", "llama"))
