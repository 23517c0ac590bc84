"""Calibrate a compression method on a model and some text: what it learns goes to a file that its parameter names."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from vericache_compile.calibration import write
from vericache_compile.compressors.learned import Learner
from vericache_compile.compressors.observed import observe
from vericache_compile.compressors.rotation import Rotation
from vericache_compile.compressors.spec import parse
from vericache_compile.compressors.table import all_methods
from vericache_compile.errors import OptionError, VericacheError
from vericache_compile.model_state import state_of
from vericache_compile.optimized_module import calls_compiled
from vericache_compile.runtime.rotations import Rotations


def calibrate(model: Any, ids: Tensor, compressor: str, out: str | os.PathLike[str]) -> dict[str, Any]:
    """Write what `compressor`, a method with its parameters, learns of `model` by the tokens ids [N, T].

    `model` is a transformers model, compiled or not; it runs uncompiled, and for some methods backwards. Returns what
    the file says of itself. Raises OptionError for a method that is not calibrated, and where the file cannot be
    written; VericacheError for a model that caches a latent.
    """
    method = learner(compressor)
    original = getattr(model, "_orig_mod", model)
    sites = {
        layer: [seen.keys.shape[0], seen.keys.shape[2], seen.values.shape[2]]
        for layer, seen in observe(original, ids[:1, :2])
    }
    if sites[min(sites)][1] == getattr(original.config.get_text_config(), "kv_lora_rank", None):
        fix = "use the method without a calibration file: it fits itself to each prompt"
        raise VericacheError("a latent cache, of which no method learns yet", type(original).__name__, fix)
    learned = method.learn(original, ids, turns_of(original, ids) if "pre_rope" in method.wants else ())
    return write(out, method.name, repr(method), original, [sites[layer] for layer in sorted(sites)], learned)


def turns_of(model: Any, ids: Tensor) -> list[Rotation | None]:
    """How each layer's keys are turned by position, read off the graph of a decode step; raises VericacheError.

    The model is captured for two new tokens after the first of ids [N, T]; nothing is compiled.
    """
    options: dict[str, Any] = {"compressor": "none", "inductor": False, "draft_dtype": "same"}
    before = state_of(list(model.parameters()))
    latest = None if before is None else before.latest
    compiled: Any = torch.compile(model, backend="vericache", options=options)
    few = {"input_ids": ids[:1, :8], "attention_mask": torch.ones_like(ids[:1, :8])}
    last = None
    try:
        with torch.no_grad(), calls_compiled(compiled):
            model.generate(**few, min_new_tokens=3, max_new_tokens=3, do_sample=False)
    finally:
        state = state_of(list(model.parameters()))
        if state is not None:
            last = None if state.latest is None else state.latest.session.last
            state.latest = latest  # `stats` speaks of what the user ran
    if last is None:
        fix = "`vericache explain` says why; a method that it does not run has no use for a calibration"
        raise VericacheError("no decode step of it is taken", f"the model {type(model).__name__}", fix)
    plan, inputs = last
    rotations = Rotations()
    return [rotations.of(plan, inputs, site.layer) for site in plan.captured.sites]


def learner(compressor: str) -> Learner:
    """The method, with its parameters, that is to be calibrated; raises OptionError where it learns nothing."""
    method = parse(compressor, {})
    if not isinstance(method, Learner):
        known = [name for name, each in all_methods().items() if isinstance(each, type) and issubclass(each, Learner)]
        fix = f"choose from: {', '.join(known)}"
        raise OptionError(f"{compressor!r} learns nothing", "the compressor to calibrate", fix)
    return method


def rows_of(ids: Tensor, rows: int, tokens: int) -> Tensor:
    """Up to `rows` rows of `tokens` tokens, spread over the text ids [T]; raises VericacheError for a short text."""
    if rows < 1 or tokens < 2:
        raise VericacheError(f"{rows} pieces of {tokens} tokens", "--rows, --tokens", "give from 1 row and 2 tokens up")
    count = min(rows, len(ids) // tokens)
    if count == 0:
        fix = f"name a longer text, or fewer --tokens than {tokens}"
        raise VericacheError(f"a text of {len(ids)} tokens", "the text to calibrate on", fix)
    step = len(ids) // count
    return ids[: step * count].view(count, step)[:, :tokens]
