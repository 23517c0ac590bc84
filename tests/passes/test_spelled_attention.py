"""Attention that a model spells out is read with its scale, soft cap, sinks and mask; windows give the same rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import Captured, Toy, run_until, run_variant, take_steps, toy_decode
from torch import Tensor, nn

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.ops import ATTEND
from vericache_compile.plan import Alibi


class Spelled(Toy):
    """Softmax by hand; tests override what is done to scores and to their softmax."""

    def change(self, scores: Tensor, *more: Tensor) -> Tensor:
        """Scores [B, H, T, C] as the softmax reads them."""
        return scores * 0.3

    def share(self, scores: Tensor) -> Tensor:
        """Probabilities [B, H, T, C]."""
        return scores.softmax(-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        return self.share(self.change(q @ k.transpose(-1, -2), *more)) @ v


class Halved(Spelled):
    """Divided in place, multiplied again, cast up and down."""

    def change(self, scores: Tensor, *more: Tensor) -> Tensor:
        scores /= 2.0
        scores *= 0.6
        return scores

    def share(self, scores: Tensor) -> Tensor:
        shares = F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
        return F.dropout(shares, p=0.5, training=False)


class Capped(Spelled):
    """A soft cap."""

    def change(self, scores: Tensor, *more: Tensor) -> Tensor:
        return torch.tanh(scores * 0.3 / 2.0) * 2.0


class Sunk(Spelled):
    """A learned score per head."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.tensor([0.5, -0.5, 1.0, 2.0]))

    def share(self, scores: Tensor) -> Tensor:
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        joined = torch.cat([scores, sinks], dim=-1)
        joined = joined - joined.max(dim=-1, keepdim=True).values
        return joined.softmax(-1)[..., :-1]


class Padded(Spelled):
    """Takes a padding mask [B, C]: filled in, chosen and added, all at once."""

    def change(self, scores: Tensor, *more: Tensor) -> Tensor:
        hidden = (more[0] == 0)[:, None, None]
        lowest = torch.finfo(scores.dtype).min
        scores = torch.where(hidden, torch.tensor(lowest), scores * 0.3)
        return scores.masked_fill(hidden, lowest) + torch.zeros_like(hidden, dtype=scores.dtype).masked_fill(
            hidden, lowest
        )


class Sloped(Padded):
    """ALiBi by place after the padding, below the scale."""

    def change(self, scores: Tensor, *more: Tensor) -> Tensor:
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
        places = (more[0].cumsum(-1) - 1) * more[0]
        return super().change(scores + slopes * places[:, None, None], *more)


class Batched(Sloped):
    """The same by baddbmm over [B * H]."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        batch, heads, tokens, size = q.shape
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None]
        places = (more[0].cumsum(-1) - 1) * more[0]
        alibi = (0.3 * slopes * places[:, None]).reshape(batch * heads, 1, -1)
        q, k, v = (x.repeat_interleave(heads // x.shape[1], dim=1).reshape(batch * heads, -1, size) for x in (q, k, v))
        scores = alibi.baddbmm(q, k.transpose(1, 2), beta=1.0, alpha=0.3).view(batch, heads, tokens, -1)
        scores = scores.masked_fill((more[0] == 0)[:, None, None], torch.finfo(scores.dtype).min)
        return torch.bmm(scores.softmax(-1).view(batch * heads, tokens, -1), v).view(batch, heads, tokens, size)


def decode_of(model: Toy, batch: int) -> Captured:
    """Its decode step, with a padding mask where it takes one."""
    if not isinstance(model, Padded):
        return toy_decode(model, batch=batch)
    padding = torch.ones(batch, 7, dtype=torch.int64)
    if batch > 1:
        padding[1, :2] = 0
    return toy_decode(model, padding, batch=batch)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model", [Spelled, Halved, Capped, Sunk, Padded, Sloped, Batched])
def test_a_window_gives_the_rows_of_single_steps(model: type[Toy], batch: int) -> None:
    call = decode_of(model(), batch)
    program = run_until(call, "expand_window", batch=batch, window=4)
    steps = take_steps(program, call, 4)
    [made] = run_variant(program, "verify", call, steps, 4)
    expected = torch.stack([row for (row,) in steps.rows])
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    [token] = run_variant(program, "draft", call, steps, 0)
    assert torch.equal(token, expected[0].argmax(-1))


def test_the_parts_are_read() -> None:
    sites = {
        model: run_until(decode_of(model(), 1), "prove_mask").sites[0].site
        for model in (Spelled, Halved, Capped, Sunk, Sloped, Batched)
    }
    assert all(site.scale == pytest.approx(0.3) for site in sites.values())
    assert sites[Capped].soft_cap == pytest.approx(2.0)
    assert sites[Sunk].sinks
    assert sites[Spelled].is_plain
    slopes = pytest.approx((0.15, 0.075, 0.0375, 0.01875))
    assert sites[Sloped].alibi == sites[Batched].alibi == Alibi(slopes, torch.float32, relative=False)


class Tempered(Spelled):
    """Scores multiplied by a weight."""

    def change(self, scores: Tensor, *more: Tensor) -> Tensor:
        return scores * self.to_q.bias.sum()


class Biased(Spelled):
    """A bias below a soft cap."""

    def change(self, scores: Tensor, *more: Tensor) -> Tensor:
        return torch.tanh(scores + torch.ones(1)) * 2.0


class Negated(Spelled):
    """Scores taken off a mask."""

    def change(self, scores: Tensor, *more: Tensor) -> Tensor:
        return torch.zeros(1) - scores


class Replaced(Spelled):
    """Puts a number that hides nothing in the place of an old key's score."""

    def change(self, scores: Tensor, *more: Tensor) -> Tensor:
        columns = scores.shape[-1]
        return (scores * 0.3).masked_fill(torch.arange(columns) < columns - 50, 0.0)


class Untransposed(Spelled):
    """Another product than that of queries and keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        return (q @ k.transpose(-1, -2).transpose(-1, -2).reshape(*k.shape[:1], 4, 8, -1)).softmax(-1) @ v


class Halfway(Sunk):
    """Drops the first column, which is no sink."""

    def share(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)[..., :-1]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        return self.share(q @ k.transpose(-1, -2)) @ v[:, :, :-1]


class Computed(Sunk):
    """Sinks that are not the model's weight."""

    def share(self, scores: Tensor) -> Tensor:
        sinks = (2 * self.sinks).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]


class Dropped(Spelled):
    """Drops probabilities."""

    def share(self, scores: Tensor) -> Tensor:
        return F.dropout(scores.softmax(-1), p=0.1, training=True)


class Across(Spelled):
    """A softmax over heads."""

    def share(self, scores: Tensor) -> Tensor:
        return scores.softmax(1)


@pytest.mark.parametrize(
    ("model", "found", "line"),
    [
        (Tempered, "attention scores multiplied by other than a constant", "self.to_q.bias.sum()"),
        (Biased, "a mask or bias below a soft cap of attention scores", "torch.ones(1)"),
        (Negated, "attention scores taken off something", "- scores"),
        (Replaced, "attention scores that do not reach the softmax as they are", "columns - 50"),
        (Untransposed, "an attention over keys that are not transposed", "reshape"),
        (Halfway, "a softmax of which other than one appended column is dropped", "q @ k.transpose"),
        (Computed, "attention sinks that are not one weight per head", "torch.cat"),
        (Dropped, "attention with dropout", "p=0.1"),
        (Across, "a softmax that is not read as attention, and no scaled_dot_product_attention call", "softmax(1)"),
    ],
)
def test_other_spellings_are_refused_with_their_source_line(model: type[Toy], found: str, line: str) -> None:
    with pytest.raises(UnsupportedGraph) as error:
        run_until(toy_decode(model()), "prove_mask")
    assert error.value.found == found
    assert line in error.value.where


class Widened(Spelled):
    """Attends in float32 over a cache of a smaller type."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, dim=1).float() for x in (k, v))
        return ((q.float() @ k.mT * 0.3).softmax(-1) @ v).to(q.dtype)


class Scaled(Widened):
    """Scales the widened queries, which are then no cast of what is cached."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, dim=1).float() for x in (k, v))
        return (((q.float() * 0.3) @ k.mT).softmax(-1) @ v).to(q.dtype)


class Left(Widened):
    """Goes on in float32 after attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, dim=1).float() for x in (k, v))
        return ((q.float() @ k.mT * 0.3).softmax(-1) @ v).mul(0.5).to(q.dtype)


@pytest.mark.parametrize("model", [Widened, Left])
def test_attention_in_a_wider_type_keeps_the_type_of_its_result(model: type[Toy]) -> None:
    program = run_until(toy_decode(model().bfloat16()), "expand_window")
    [attend] = [node for node in program.variants["draft"].graph.nodes if node.target is ATTEND]
    assert attend.meta["val"].dtype is torch.bfloat16
    assert {user.meta["val"].dtype for user in attend.users} == {torch.float32}


def test_queries_of_another_type_than_the_cache_are_refused() -> None:
    with pytest.raises(UnsupportedGraph) as error:
        run_until(toy_decode(Scaled().bfloat16()), "find_attention")
    assert error.value.found == "queries of float32 over cached keys of bfloat16 and values of bfloat16"


class Named(Spelled):
    """Products with their operands' names."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        return (torch.matmul(other=k.mT, input=q) * 0.3).softmax(-1) @ v


def test_operands_may_be_named() -> None:
    assert run_until(toy_decode(Named()), "prove_mask").sites[0].site.scale == pytest.approx(0.3)


class Doubled(Sunk):
    """Two columns of sinks."""

    def share(self, scores: Tensor) -> Tensor:
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        return torch.cat([scores[..., 1:], sinks, sinks], dim=-1).softmax(-1)[..., :-1]


def test_more_than_one_appended_column_is_refused() -> None:
    with pytest.raises(UnsupportedGraph, match="sinks that are not one column after all others"):
        run_until(toy_decode(Doubled()), "find_attention")
