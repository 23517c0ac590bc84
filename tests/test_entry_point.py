"""The backend is found by its name alone: no import of ours in the user's code."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

MODEL = """
    import sys, torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.randint(1, 97, (1, 50))
    options = {"inductor": False, "window": 4}
    plain = model.generate(ids, max_new_tokens=20, do_sample=False)
    def rounds():
        state = next(model.parameters())._vericache
        return state.latest.session.counts.rounds
"""


def run(body: str) -> str:
    """Run a program that imports only torch and transformers; returns its standard output."""
    program = textwrap.dedent(MODEL) + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "body",
    [
        """
        model.compile(backend="vericache", options=options)
        assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), plain)
        """,
        """
        compiled = torch.compile(model, backend="vericache", options=options)
        assert torch.equal(compiled.generate(ids, max_new_tokens=20, do_sample=False), plain)
        assert model._compiled_call_impl is None
        """,
        pytest.param(
            """
        compiled = torch.compile(model, backend="vericache", options=options)
        with torch.inference_mode():
            out = compiled(input_ids=ids)
            tokens = [out.logits[:, -1:].argmax(-1)]
            for _ in range(19):
                out = compiled(input_ids=tokens[-1], past_key_values=out.past_key_values)
                tokens.append(out.logits[:, -1:].argmax(-1))
        assert torch.equal(torch.cat(tokens, 1), plain[:, 50:])
        """,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            """
        import os
        os.environ["VERICACHE_INDUCTOR"] = "0"
        compiled = torch.compile(model, backend="vericache", mode="reduce-overhead")
        assert torch.equal(compiled.generate(ids, max_new_tokens=20, do_sample=False), plain)
        """,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["model.compile", "torch.compile then generate", "torch.compile then calls", "mode and environment"],
)
def test_works_by_name(body: str) -> None:
    assert (
        run(body + "\n        assert rounds() > 0\n        print('ran', 'vericache_compile' in sys.modules)")
        == "ran True"
    )


def test_is_listed() -> None:
    assert run("print('vericache' in torch.compiler.list_backends())") == "True"


def test_the_pipeline_uses_the_compiled_model() -> None:
    """pipeline(model=compiled) reaches the backend and gives the plain text."""
    out = run(
        """
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, pipeline
        words = {f"w{i}": i for i in range(97)}
        raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0", pad_token="w0")
        text = " ".join(f"w{i}" for i in ids[0].tolist())
        settings = dict(max_new_tokens=20, do_sample=False)
        before = pipeline("text-generation", model=model, tokenizer=tokenizer)(text, **settings)
        compiled = torch.compile(model, backend="vericache", options=options)
        after = pipeline("text-generation", model=compiled, tokenizer=tokenizer)(text, **settings)
        assert before == after, (before, after)
        assert rounds() > 0
        print("same")
        """
    )
    assert out.endswith("same")


@pytest.mark.slow
def test_the_patch_can_be_switched_off() -> None:
    out = run(
        """
        import os
        os.environ["VERICACHE_PATCH_GENERATE"] = "0"
        compiled = torch.compile(model, backend="vericache", options=options)
        compiled.generate(ids, max_new_tokens=4, do_sample=False)
        print(hasattr(next(model.parameters()), "_vericache"))
        """
    )
    assert out == "False"


@pytest.mark.slow
def test_the_first_compilation_says_one_line() -> None:
    program = textwrap.dedent(MODEL) + textwrap.dedent(
        """
        model.compile(backend="vericache", options={**options, "compressor": "kivi", "bits": 2})
        model.generate(ids, max_new_tokens=20, do_sample=False)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("vericache:")]
    assert len(lines) == 1
    for part in ("graphs seen 2", "attention sites taken 2 of 2", "Kivi(bits=2", "window 4", "512 full"):
        assert part in lines[0]
