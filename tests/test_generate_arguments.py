"""Whatever `generate` is asked for beside greedy tokens, a compiled model answers as the plain one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from callers import OPTIONS, greedy, prompt
from models import VOCABULARY, make_prompt, make_tiny
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from vericache_compile import stats

Asked = Callable[[PreTrainedModel], Tensor]


@pytest.fixture(scope="module")
def compiled() -> PreTrainedModel:
    model = make_tiny("llama")
    with torch.no_grad():  # transformers' hooks, which break the graph of the call that installs them
        model(input_ids=prompt(), output_hidden_states=True)
    model.compile(backend="vericache", options={**OPTIONS, "strict": True})
    greedy(model, prompt(), count=2)
    return model


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


def an_allowed_prefix(model: PreTrainedModel) -> Tensor:
    """Odd and even tokens take turns."""

    def allowed(_: int, ids: Tensor) -> list[int]:
        return list(range(3 + int(ids[-1]) % 2, VOCABULARY, 2))

    return greedy(model, prompt(batch=2), prefix_allowed_tokens_fn=allowed, sequence_bias={(8,): 1.5, (9, 10): -2.0})


def a_prompt_to_stay_away_from(model: PreTrainedModel) -> Tensor:
    """Classifier-free guidance calls the model once more per token, on a cache of its own."""
    return greedy(model, prompt(), guidance_scale=1.5, negative_prompt_ids=prompt(25).roll(1, 1))


@torch.no_grad()
def groups_of_beams(model: PreTrainedModel) -> Tensor:
    """Diverse beam search (arXiv 1610.02424): two groups of two beams, the second fined for the first one's tokens."""
    cache, ids, given = DynamicCache(config=model.config), prompt().repeat(4, 1), prompt().repeat(4, 1)
    sums = torch.tensor([0.0, -1e9, 0.0, -1e9])
    for _ in range(12):
        logs = model(input_ids=given, past_key_values=cache).logits[:, -1].log_softmax(-1)
        parents, chosen = [], []
        for group in (slice(0, 2), slice(2, 4)):
            fine = torch.zeros(logs.shape[1])
            fine[chosen] = 0.5
            best = (sums[group, None] + logs[group] - fine).flatten().topk(2)
            sums[group] = best.values
            parents += (best.indices // logs.shape[1] + group.start).tolist()
            chosen += (best.indices % logs.shape[1]).tolist()
        cache.reorder_cache(torch.tensor(parents))
        given = torch.tensor(chosen)[:, None]
        ids = torch.cat([ids[parents], given], 1)
    return ids


@torch.no_grad()
def contrastive_search(model: PreTrainedModel) -> Tensor:
    """Of four candidates the one that is likely and unlike what was seen (arXiv 2202.06417)."""
    cache, ids, more = DynamicCache(config=model.config), prompt(), {"output_hidden_states": True}
    out = model(input_ids=ids, past_key_values=cache, **more)
    seen, logits = out.hidden_states[-1][0], out.logits[0, -1]
    for _ in range(10):
        likely = logits.softmax(-1).topk(4)
        cache.batch_repeat_interleave(4)
        out = model(input_ids=likely.indices[:, None], past_key_values=cache, **more)
        new = out.hidden_states[-1][:, -1]
        alike = torch.cosine_similarity(new[:, None], seen[None], dim=-1).amax(-1)
        best = int((0.4 * likely.values - 0.6 * alike).argmax())
        cache.batch_select_indices(torch.tensor([best]))
        seen, logits = torch.cat([seen, new[best, None]]), out.logits[best, -1]
        ids = torch.cat([ids, likely.indices[best].view(1, 1)], 1)
    return ids


def a_forced_end(model: PreTrainedModel) -> Tensor:
    return greedy(model, prompt(), min_new_tokens=5, forced_eos_token_id=9, bad_words_ids=[[3], [5, 6]])


ASKED: list[Asked] = [
    a_cache_of_ones_own, scores_beside_tokens, a_stopping_rule, a_processor_of_ones_own, a_streamer,
    samples_of_a_padded_batch, beams, a_prompt_looked_up, a_prompt_in_chunks, a_forced_end,
    an_allowed_prefix, *(pytest.param(call, marks=pytest.mark.slow) for call in (
        a_prompt_to_stay_away_from, groups_of_beams, contrastive_search,
    )),
]  # fmt: skip
SLOW = [pytest.param(ask, marks=pytest.mark.slow) for ask in (sampled_beams, an_assistant)]


@pytest.mark.parametrize("ask", [*ASKED, *SLOW])
def test_the_answer_is_the_plain_one(ask: Asked, compiled: PreTrainedModel) -> None:
    before = stats(compiled)["rounds"]
    plain, ours = ask(make_tiny("llama")), ask(compiled)
    assert torch.equal(ours, plain)
    assert stats(compiled)["rounds"] > before or ask is a_prompt_looked_up, "its calls bring several tokens"


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"output_logits": True}, ("logits",)),
        ({"output_scores": True, "repetition_penalty": 1.2}, ("scores",)),
        ({"output_scores": True, "do_sample": True, "top_k": 20}, ("scores",)),
        ({"output_scores": True, "num_beams": 2, "num_return_sequences": 2}, ("scores", "sequences_scores")),
    ],
)
def test_what_comes_beside_tokens_is_close_to_the_plain_models(
    more: dict[str, Any], found: tuple[str, ...], compiled: PreTrainedModel
) -> None:
    before, both = stats(compiled)["rounds"], []
    for model in (make_tiny("llama"), compiled):
        torch.manual_seed(7)
        both.append(greedy(model, prompt(), count=15, return_dict_in_generate=True, **more))
    assert torch.equal(both[1].sequences, both[0].sequences)
    assert stats(compiled)["rounds"] > before
    for name in found:
        torch.testing.assert_close(both[1][name], both[0][name], atol=1e-4, rtol=1e-4)


def test_a_batch_after_a_prompt_lookup_is_taken(compiled: PreTrainedModel) -> None:
    """By then Dynamo takes both the batch and `logits_to_keep` for sizes that vary."""
    a_prompt_looked_up(compiled)
    for batch in (2, 3):
        before = stats(compiled)["rounds"]
        assert torch.equal(greedy(compiled, prompt(batch=batch)), greedy(make_tiny("llama"), prompt(batch=batch)))
        assert stats(compiled)["rounds"] > before


@pytest.mark.slow
def test_assistant_and_model_may_both_be_compiled(compiled: PreTrainedModel) -> None:
    """Each has sequences of its own; the assistant's cache is cropped after each of its turns."""
    plain = greedy(make_tiny("llama"), prompt(), count=15)
    assistant = make_tiny("llama", seed=1)
    assistant.generation_config.assistant_confidence_threshold = 0.0  # else it gives up after a token
    assistant.compile(backend="vericache", options={**OPTIONS, "strict": True})
    assert torch.equal(greedy(compiled, prompt(), assistant_model=assistant, count=15), plain)
    assert stats(assistant)["rounds"] > 0
