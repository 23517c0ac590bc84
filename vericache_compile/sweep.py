"""`vericache sweep`: which families of models are taken, tried on small random ones against plain generate."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vericache_compile.cli_commands import check_folder
from vericache_compile.sweep_models import HYBRIDS, LAYERS, VOCABULARY, attentions_of, check_names, make_model
from vericache_compile.terminal import print_columns, progress

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule
    from transformers import PreTrainedModel

WINDOW = 8
PROMPT_TOKENS = 48
NEW_TOKENS = 1 + 3 * WINDOW
"""The first comes from prefill; full rounds give the others."""
BATCHES = (1, 3)
COMPRESSORS = ("none", "snapkv(keep=0.4, window=8)")
COLUMNS = (
    "model", "attention", "sites / layers", "taken", "variant checks", "identical", "tokens per round", "with snapkv",
    "reason",
)  # fmt: skip


@dataclass
class Finding:
    """What came out for one family and attention implementation, over all batches."""

    name: str
    attention: str
    layers: int = LAYERS
    sites: int = 0
    """Attention sites of a decode step that is taken."""
    taken: bool = True
    checks: str = "passed"
    """What is checked of the variants after each pass, or the first check that failed."""
    identical: bool = True
    tokens_per_round: float = 0.0
    """With drafts over the full cache, batch 1: the window, unless a draft was wrong."""
    tokens_per_round_snapkv: float = 0.0
    not_taken: list[str] = field(default_factory=list)

    @property
    def row(self) -> tuple[str, ...]:
        """The cells of a table."""
        taken, identical = ("yes" if value else "no" for value in (self.taken, self.identical))
        rates = (f"{rate:.1f}" if rate else "" for rate in (self.tokens_per_round, self.tokens_per_round_snapkv))
        first = (self.name, self.attention, f"{self.sites} / {self.layers}", taken, self.checks, identical)
        return (*first, *rates, "; ".join(self.not_taken))

    @property
    def is_right(self) -> bool:
        """Whether tokens are plain, and the model is taken if it can be, with no wrong draft over the full cache."""
        rate = 0 if self.name in HYBRIDS else WINDOW
        return self.identical and (self.taken, self.tokens_per_round) == (rate > 0, rate)


def sweep(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Exit code 1 where a token differs, a check fails, a model is not taken, or a draft over all tokens is wrong."""
    pairs = [(name, attention) for name in check_names(args.names) for attention in attentions_of(name)]
    labels = [f"{name}, {attention}" for name, attention in pairs]
    if args.markdown:
        check_folder(args.markdown, "--markdown")
    with _quiet():
        found = [try_model(*pairs[i], inductor=args.inductor) for i in progress(labels, "trying small models")]
    print_columns("vericache sweep", COLUMNS, [each.row for each in found])
    if args.markdown:
        Path(args.markdown).write_text(as_markdown(found, args.inductor), encoding="utf-8")
    return as_dict(found, args.inductor), 0 if all(each.is_right for each in found) else 1


@contextmanager
def _quiet() -> Iterator[None]:
    """What is taken and what is not is in the table; say it once."""
    log = logging.getLogger("vericache_compile")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def try_model(name: str, attention: str, *, inductor: bool = False) -> Finding:
    """Generate with a small model, plain and compiled, alone and in a batch that is padded on the left."""
    import torch

    from vericache_compile.api import stats

    finding = Finding(name, attention)
    for batch in BATCHES:
        torch._dynamo.reset()
        model, prompt = make_model(name, attention), make_prompt(batch)
        plain, switch = _generate(model, prompt), _Switch()
        model.compile(backend=switch)
        for compressor in COMPRESSORS:
            switch.options = {
                "compressor": compressor,
                "window": WINDOW,
                "inductor": inductor,
                "draft_dtype": "same",
            }
            try:
                ours = _generate(model, prompt)
            except AssertionError as error:
                first = (str(error).splitlines() or ["an assertion"])[0]
                finding.taken, finding.identical, finding.checks = False, False, first
                return finding
            finding.identical &= torch.equal(plain, ours)
            numbers = stats(model)
            finding.not_taken += [reason for reason in numbers["not_taken"] if reason not in finding.not_taken]
            if not numbers["rounds"]:
                finding.taken = False
            elif batch == 1 and compressor == COMPRESSORS[0]:
                finding.sites, finding.tokens_per_round = numbers["sites"], numbers["tokens_per_round"]
            elif batch == 1:
                finding.tokens_per_round_snapkv = numbers["tokens_per_round"]
    torch._dynamo.reset()
    return finding


def make_prompt(batch: int) -> dict[str, Tensor]:
    """Random input_ids [B, T] and attention_mask; rows after the first are padded on the left."""
    import torch

    ids = torch.randint(3, VOCABULARY, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for b in range(1, batch):
        ids[b, : 5 * b], mask[b, : 5 * b] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _generate(model: PreTrainedModel, prompt: Mapping[str, Tensor]) -> Tensor:
    made: Tensor = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return made


class _Switch:
    """The backend under options that change between calls, so that Dynamo captures a model once for all of them."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def __call__(self, module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from vericache_compile.backend import vericache

        made: dict[str, Callable[..., Any]] = {}

        def call(*inputs: Any) -> Any:
            key = str(self.options)
            if key not in made:
                made[key] = vericache(module, inputs, options=self.options)
            return made[key](*inputs)

        return call


def as_dict(found: Iterable[Finding], inductor: bool) -> dict[str, Any]:
    """What --json prints."""
    models = [asdict(each) | {"reason": "; ".join(each.not_taken) or None} for each in found]
    how = {"window": WINDOW, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "batches": BATCHES}
    return {"models": models, **how, "inductor": inductor, **_versions()}


def as_markdown(found: Iterable[Finding], inductor: bool) -> str:
    """A page with the table, and how it was made."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(each.row for each in found)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    how = "compiled by Inductor" if inductor else "run eagerly"
    return (
        "# Models\n\n"
        f"`vericache sweep --markdown FILE` wrote this page ({versions}): small random models of {LAYERS} layers in "
        f"float32, {PROMPT_TOKENS} prompt tokens and {NEW_TOKENS} new ones, alone and in a batch of {BATCHES[-1]} "
        f"padded on the left, window {WINDOW}, segments {how}.\n\n"
        "Variant checks are those of `passes/check.py`, after each pass. Identical means the tokens of plain "
        "`generate`. A model that is not taken runs under plain Inductor, with the reason. "
        f"Tokens per round are for batch 1, with drafts over the full cache ({WINDOW} is all there can be) and over "
        "`snapkv`'s; random weights say little of what real text gives.\n\n"
        f"{table}\n"
    )


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
