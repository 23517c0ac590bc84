"""Whatever `generate` is asked for beside greedy tokens, a compiled model answers as the plain one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from callers import OPTIONS, greedy, prompt
from models import make_prompt, make_tiny
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from vericache_compile import stats

pytestmark = pytest.mark.shared_captures
Asked = Callable[[PreTrainedModel], Tensor]


@pytest.fixture(scope="module")
def compiled() -> Iterator[PreTrainedModel]:
    torch._dynamo.reset()
    model = make_tiny("llama")
    model.compile(backend="vericache", options={**OPTIONS, "strict": True})
    yield model
    torch._dynamo.reset()


class Threes(StoppingCriteria):
    """Stops once a token that three divides was generated after the tenth, and scores are those of its step."""

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        assert int(scores[-1].argmax(-1)[0]) == int(input_ids[0, -1])
        return (input_ids[:, -1] % 3 == 0) & (input_ids.shape[1] > 50)


class Shifted(LogitsProcessor):
    """Forbids the token that was just generated and favours its neighbour."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.scatter(1, input_ids[:, -1:], float("-inf"))
        return scores.scatter_add(1, (input_ids[:, -1:] + 1) % scores.shape[1], torch.ones_like(scores[:, :1]))


class Kept(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def a_cache_of_ones_own(model: PreTrainedModel) -> Tensor:
    cache = DynamicCache(config=model.config)
    out = greedy(model, prompt(), past_key_values=cache)
    assert cache.get_seq_length() == out.shape[1] - 1
    return out


def scores_beside_tokens(model: PreTrainedModel) -> Tensor:
    more = {"return_dict_in_generate": True, "output_scores": True, "repetition_penalty": 1.2}
    out = greedy(model, prompt(), **more)
    chosen = torch.stack(out.scores).argmax(-1)
    assert torch.equal(chosen.t(), out.sequences[:, 40:])
    return out.sequences


def a_stopping_rule(model: PreTrainedModel) -> Tensor:
    more = {"return_dict_in_generate": True, "output_scores": True, "stopping_criteria": [Threes()]}
    return greedy(model, prompt(), **more).sequences


def a_processor_of_ones_own(model: PreTrainedModel) -> Tensor:
    return greedy(model, prompt(), logits_processor=LogitsProcessorList([Shifted()]))


def a_streamer(model: PreTrainedModel) -> Tensor:
    kept = Kept()
    out = greedy(model, prompt(), streamer=kept)
    assert kept.ended
    assert kept.tokens == out[0].tolist()
    return out


def samples_of_a_padded_batch(model: PreTrainedModel) -> Tensor:
    torch.manual_seed(7)
    more = {"num_return_sequences": 2, "top_k": 20, "temperature": 0.7}
    return model.generate(**make_prompt(30, 2), max_new_tokens=20, do_sample=True, **more)


def beams(model: PreTrainedModel) -> Tensor:
    return greedy(model, prompt(), num_beams=3, num_return_sequences=2, length_penalty=0.5, count=15)


def sampled_beams(model: PreTrainedModel) -> Tensor:
    torch.manual_seed(7)
    return greedy(model, prompt(), num_beams=2, do_sample=True, count=12)


def an_assistant(model: PreTrainedModel) -> Tensor:
    return greedy(model, prompt(), assistant_model=make_tiny("llama", seed=1), count=15)


def a_prompt_looked_up(model: PreTrainedModel) -> Tensor:
    return greedy(model, prompt(12).repeat(1, 3), prompt_lookup_num_tokens=4, count=20)


def a_prompt_in_chunks(model: PreTrainedModel) -> Tensor:
    return greedy(model, prompt(), prefill_chunk_size=16)


def a_forced_end(model: PreTrainedModel) -> Tensor:
    return greedy(model, prompt(), min_new_tokens=5, forced_eos_token_id=9, bad_words_ids=[[3], [5, 6]])


ASKED: list[Asked] = [
    a_cache_of_ones_own, scores_beside_tokens, a_stopping_rule, a_processor_of_ones_own, a_streamer,
    samples_of_a_padded_batch, beams, a_prompt_looked_up, a_prompt_in_chunks, a_forced_end,
]  # fmt: skip
SLOW = [pytest.param(ask, marks=pytest.mark.slow) for ask in (sampled_beams, an_assistant)]


@pytest.mark.parametrize("ask", [*ASKED, *SLOW])
def test_the_answer_is_the_plain_one(ask: Asked, compiled: PreTrainedModel) -> None:
    plain, ours = ask(make_tiny("llama")), ask(compiled)
    assert torch.equal(ours, plain)
    assert stats(compiled)["rounds"] > 0


def test_logits_are_the_plain_ones(compiled: PreTrainedModel) -> None:
    more = {"return_dict_in_generate": True, "output_logits": True}
    plain, ours = (greedy(model, prompt(), **more).logits for model in (make_tiny("llama"), compiled))
    torch.testing.assert_close(torch.stack(ours), torch.stack(plain), atol=1e-4, rtol=1e-4)


def test_assistant_and_model_may_both_be_compiled(compiled: PreTrainedModel) -> None:
    """Each has sequences of its own; the assistant's cache is cropped after each of its turns."""
    plain = greedy(make_tiny("llama"), prompt(), count=15)
    assistant = make_tiny("llama", seed=1)
    assistant.compile(backend="vericache", options={**OPTIONS, "strict": True})
    assert torch.equal(greedy(compiled, prompt(), assistant_model=assistant, count=15), plain)
    assert stats(assistant)["rounds"] > 0
