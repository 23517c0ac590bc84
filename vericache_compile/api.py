"""What a user asks of a compiled model: statistics, and the self-check against plain greedy decoding."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vericache_compile.config import Config, make_config
from vericache_compile.errors import VericacheError
from vericache_compile.model_state import Compilation, ModelState, state_of
from vericache_compile.optimized_module import calls_compiled
from vericache_compile.plan import Way


@dataclass(frozen=True)
class CheckReport:
    """The self-check's findings; token indices count generated tokens from 0."""

    identical: bool
    tokens: int
    """Tokens compared, over all rows."""
    first_difference: int | None
    margin: float | None
    """Plain decoding's gap between its two largest logits at the first difference."""
    lossy_divergence: int | None
    """First token that the compressed cache alone, read with the model's own weights, would get wrong; None when it
    gets none wrong, or when nothing was drafted (`tokens_per_round` is 0)."""
    plain_tokens: list[list[int]]
    tokens_per_round: float
    """Per row of the batch: at most the window."""
    plain_seconds_per_token: float
    seconds_per_token: float

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        alone = "never" if self.lossy_divergence is None else f"at token {self.lossy_divergence}"
        alone = alone if self.tokens_per_round else "at no token that was measured: nothing was drafted"
        verdict = (
            f"identical: {self.tokens} tokens"
            if self.identical
            else f"different from token {self.first_difference} on (top-2 logit margin there {self.margin:.2g})"
        )
        return f"{verdict}; {self.tokens_per_round:.1f} tokens per round; the compressed cache alone diverges {alone}"


def stats(model: torch.nn.Module) -> dict[str, Any]:
    """Counts, seconds and bytes of a compiled model's latest configuration; VericacheError for any other model.

    Of the bytes, `draft_weights` and `all_sequences` are those of all its configurations together.
    """
    state, made = _compilation(model)
    counts, session = made.session.counts, made.session
    held, link = session.footprint, session.housing.home.link
    return {
        "rounds": counts.rounds,
        "drafted": counts.drafted,
        "accepted": counts.accepted,
        "served_rows": counts.served,
        "rounds_without_drafts": counts.rested,
        "refreshes": counts.refreshes,
        "tokens_per_round": counts.served / counts.row_rounds if counts.row_rounds else 0.0,
        "accepted_by_position": list(counts.positions),
        "acceptance_by_position": [
            accepted / drafted if drafted else 0.0
            for accepted, drafted in zip(counts.positions, counts.drafted_positions, strict=True)
        ],
        "latest_rounds": [asdict(each) for each in counts.latest],
        "seconds": {
            "draft": counts.draft_seconds,
            "verify": counts.verify_seconds,
            "compress": counts.compress_seconds,
            "repeat": counts.repeat_seconds,
            "prefill": session.prefill_seconds,
            "compile": made.seconds,
            "transfer": counts.traffic.seconds,
            "transfer_wait": counts.traffic.waited,
        },
        "bytes": {
            "full": held.full,
            "full_on_device": held.resident,
            "staging": held.staging,
            "transferred": counts.traffic.nbytes,
            "stored": 0 if link is None else link.stored,
            "recalled": counts.recalled,
            "draft": held.draft,
            "set_apart": held.apart,
            "calibration": session.compressor.shared_nbytes,
            "draft_weights": session.casts.nbytes,
            "per_token_full": sum(site.bytes_per_token for site in made.sites),
            "per_token_draft": held.draft / held.tokens if held.tokens else 0.0,
            "all_sequences": state.table.nbytes,
        },
        "compressor": str(session.compressor),
        "window": made.config.window,
        "placement": session.placement,
        "way": session.way,
        "sites": len(made.sites),
        "graphs": dict(made.graphs),
        "segments": len(made.compiled),
        "not_taken": list(made.reasons),
    }


def _compilation(model: torch.nn.Module) -> tuple[ModelState, Compilation]:
    state = state_of(list(_original(model).parameters()))
    if state is None or state.latest is None:
        raise VericacheError(
            "this model has not run under vericache yet",
            type(_original(model)).__name__,
            'compile it with model.compile(backend="vericache") and call it once',
        )
    return state, state.latest


def _original(model: torch.nn.Module) -> torch.nn.Module:
    return getattr(model, "_orig_mod", model)


def check(
    model: torch.nn.Module, inputs: Mapping[str, Tensor], *, max_new_tokens: int = 64, **options: Any
) -> CheckReport:
    """Run plain greedy decoding and vericache on the same inputs and compare tokens.

    `model` is a transformers model, compiled or not; `inputs` holds input_ids [B, T] and attention_mask; `options` are
    the backend's. Both sides run in this process, one after the other.
    """
    original = _original(model)
    config = make_config(options)
    compiled: Any = torch.compile(original, backend="vericache", options=options or None)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
    with _uncompiled(original):
        clock = _Clock()
        plain = original.generate(**inputs, **settings, output_logits=True, logits_processor=[clock])  # type: ignore[operator]
        plain_seconds = clock.per_token
        with calls_compiled(compiled):
            before = _rounds(original, config)
            clock = _Clock()
            ours = original.generate(**inputs, **settings, logits_processor=[clock])  # type: ignore[operator]
            rounds, served = (now - then for now, then in zip(_rounds(original, config), before, strict=True))
        prompt = inputs["input_ids"].shape[1]
        plain_tokens, our_tokens = plain.sequences[:, prompt:], ours.sequences[:, prompt:]
        first = _first_difference(plain_tokens, our_tokens)
        if config.draft_dtype_on(inputs["input_ids"].device) is not None:  # the compressed cache is to be judged alone
            compiled = torch.compile(original, backend="vericache", options={**options, "draft_dtype": "same"})
        lossy = _lossy_divergence(compiled, inputs, plain_tokens) if rounds else None
        _make_latest(original, config)
    return CheckReport(
        identical=first is None,
        tokens=plain_tokens.numel(),
        first_difference=first,
        margin=None if first is None else _margin(plain.logits, plain_tokens, our_tokens, first),
        lossy_divergence=lossy,
        plain_tokens=plain_tokens.tolist(),
        tokens_per_round=served / rounds if rounds else 0.0,
        plain_seconds_per_token=plain_seconds,
        seconds_per_token=clock.per_token,
    )


class _Clock:
    """A logits processor that changes nothing and notes when each token's logits arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        return scores

    @property
    def per_token(self) -> float:
        """Mean seconds per decoded token, the first one (prefill) left out."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else 0.0


@contextmanager
def _uncompiled(model: torch.nn.Module) -> Iterator[None]:
    """Calls of the model run uncompiled while this is open."""
    held = model._compiled_call_impl
    model._compiled_call_impl = None
    try:
        yield
    finally:
        model._compiled_call_impl = held


def _rounds(model: torch.nn.Module, config: Config) -> tuple[int, int]:
    state = state_of(list(model.parameters()))
    if state is None or config not in state.compilations:
        return 0, 0
    counts = state.compilations[config].session.counts
    return counts.row_rounds, counts.served


def _make_latest(model: torch.nn.Module, config: Config) -> None:
    """`stats` speaks of this configuration again."""
    state = state_of(list(model.parameters()))
    if state is not None and config in state.compilations:
        state.latest = state.compilations[config]


def _first_difference(plain: Tensor, ours: Tensor) -> int | None:
    length = min(plain.shape[1], ours.shape[1])
    differs = (plain[:, :length] != ours[:, :length]).any(0).nonzero()
    if len(differs):
        return int(differs[0])
    return None if plain.shape == ours.shape else length


def _margin(logits: tuple[Tensor, ...], plain: Tensor, ours: Tensor, index: int) -> float:
    """The smallest top-2 gap among the rows that differ at `index`."""
    if index >= min(plain.shape[1], ours.shape[1]):
        return float("nan")
    rows = (plain[:, index] != ours[:, index]).nonzero().flatten()
    top = logits[index][rows].float().topk(2, dim=-1).values
    return float((top[:, 0] - top[:, 1]).min())


def _lossy_divergence(compiled: Any, inputs: Mapping[str, Tensor], plain: Tensor) -> int | None:
    """First generated token at which greedy decoding on the compressed cache alone leaves plain decoding."""
    if plain.shape[1] < 2:
        return None
    settings = {"do_sample": False, "return_dict_in_generate": True}
    with torch.no_grad(), calls_compiled(compiled):
        few = {name: tensor[:, -8:] for name, tensor in inputs.items()}
        compiled._orig_mod.generate(**few, min_new_tokens=2, max_new_tokens=2, **settings)  # makes a decode plan
        held = compiled._orig_mod.generate(**inputs, max_new_tokens=1, **settings)
    _, made = _compilation(compiled)
    if made.session.last is None:
        return None
    assert made.session.newest is not None, "a prefill makes a sequence"
    if made.session.newest.arranged.way is Way.OFF:
        return None  # there is no room for a compressed cache
    alone = made.session.draft_alone(made.session.newest, plain[:, 0].tolist(), plain.shape[1] - 1)
    del held
    differs = torch.tensor(alone) != plain[:, 1:].cpu()
    differs &= ~_ended(plain[:, :-1].cpu(), compiled._orig_mod.generation_config.eos_token_id)
    first = differs.any(0).nonzero()
    return int(first[0]) + 1 if len(first) else None


def _ended(tokens: Tensor, end: int | list[int] | None) -> Tensor:
    """Where in tokens [B, T] a row has ended, the token that ends it included: what follows is padding."""
    return torch.isin(tokens, torch.tensor([] if end is None else end, dtype=tokens.dtype)).cumsum(-1) > 0
