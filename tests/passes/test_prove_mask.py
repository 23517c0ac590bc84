"""A mask is taken when it shows every column from the padding on, however it is spelled, and only then."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import Toy, Twin, run_until, tiny_decode, toy_decode
from models import SLIDING, SLIDING_WINDOW
from torch import Tensor

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.pipeline import column_limit
from vericache_compile.passes.prove_mask import prove_mask
from vericache_compile.plan import Alibi


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("llama", 1),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("llama", 3), ("qwen3", 1), ("gpt2", 1), ("gpt2", 3))
        ),
    ],
)
def test_the_masks_of_real_models_are_proved(name: str, batch: int) -> None:
    """One row without padding has a mask in some versions of transformers, and none in others."""
    program = run_until(tiny_decode(name, batch), "split_captured", batch=batch)
    before = program.module.print_readable(False)
    masked = sum(nodes.mask is not None for nodes in program.sites)
    assert masked == 3 or (batch == 1 and masked == 0)
    assert prove_mask(program) == prove_mask(program) == masked
    assert program.module.print_readable(False) == before, "a proof changes nothing"


class Masked(Toy):
    """Attends under a mask [1, 1, 1, S + 1] of its own."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        return (torch.arange(columns) < columns)[None, None, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.mask(k.shape[2], *more), enable_gqa=True)


class Small(Masked):
    """The same in two dimensions."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        return torch.arange(columns)[None] <= columns - 1


class Added(Masked):
    """The same, added to the scores."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        lowest = torch.finfo(torch.float32).min
        return torch.zeros(1, 1, 1, columns).masked_fill(torch.arange(columns) >= columns, lowest)


class Padded(Masked):
    """Takes a padding mask [B, S + 1]."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        return (more[0] != 0)[:, None, None]


class PaddedBias(Masked):
    """Takes the lowest number off the scores of padding."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        dtype = self.to_q.weight.dtype
        return ((1 - more[0]).to(dtype) * torch.finfo(dtype).min)[:, None, None]


@pytest.mark.parametrize("model", [Masked, Small, Added])
def test_causal_masks_are_taken(model: type[Toy]) -> None:
    assert prove_mask(run_until(toy_decode(model()), "split_captured")) == 1


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("model", "dtype"), [(Padded, torch.float32), (PaddedBias, torch.float32), (PaddedBias, torch.float16)]
)
def test_left_padding_is_taken(model: type[Toy], dtype: torch.dtype, batch: int) -> None:
    padding = torch.ones(batch, 7, dtype=torch.int64)
    call = toy_decode(model().to(dtype), padding, batch=batch)
    assert prove_mask(run_until(call, "split_captured", batch=batch)) == 1


class Sliding(Masked):
    """Sees a window."""

    window = 3

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        return (torch.arange(columns) > columns - 1 - self.window)[None, None, None]


class Wide(Sliding):
    """Sees a window that no short cache fills."""

    window = 5000


class Stepped(Masked):
    """Sees half of all columns."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        return (torch.arange(columns) >= columns // 2)[None, None, None]


class Hiding(Masked):
    """Sees nothing."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        return (torch.arange(columns) > columns)[None, None, None]


@pytest.mark.parametrize("model", [Sliding, Wide])
def test_a_sliding_window_is_found_however_wide(model: type[Sliding]) -> None:
    program = run_until(toy_decode(model()), "split_captured")
    assert program.sites[0].site.window is None
    assert prove_mask(program) == prove_mask(program) == 1
    assert program.sites[0].site.window == model.window


@pytest.mark.parametrize(
    ("name", "batch", "tokens"),
    [
        ("mistral", 1, 7),
        ("gemma3_text", 3, 40),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("mistral", 1, 40), ("gemma3_text", 3, 7))),
    ],
)
def test_the_windows_of_real_models_are_found(name: str, batch: int, tokens: int) -> None:
    """Before the window fills, the cut of the cache says how wide it will be."""
    program = run_until(tiny_decode(name, batch, tokens=tokens), "prove_mask", batch=batch)
    kinds = SLIDING[name].get("layer_types", ["sliding_attention"] * 2)
    windows = [nodes.site.window for nodes in program.sites]
    assert windows == [SLIDING_WINDOW if kind == "sliding_attention" else None for kind in kinds]


class Chunked(Masked):
    """Sees its own chunk of 2,048 columns."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        chunk = torch.arange(columns) // 2048
        return (chunk == chunk[-1])[None, None, None]


class Banded(Masked):
    """Sees every other column."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        return (torch.arange(columns) % 2 == (columns - 1) % 2)[None, None, None]


class Sloped(Masked):
    """Adds a bias that grows with distance (ALiBi), the same for all heads."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        return 0.1 * (torch.arange(columns) - columns + 1)[None, None, None]


class SlopedSliding(Sloped):
    """The same, and sees a window."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        hidden = torch.arange(columns) <= columns - 1 - 40
        return super().mask(columns).masked_fill(hidden, torch.finfo(torch.float32).min)


class Placed(Masked):
    """Adds a bias that grows with the place after the padding, in bfloat16, with a slope per head."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        places = (more[0].cumsum(-1) - 1) * more[0]
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).bfloat16()
        lowest = torch.finfo(torch.float32).min
        bias = (slopes[:, None] * places[:, None]).float()
        return bias.masked_fill(more[0][:, None] == 0, lowest)[:, :, None]


class Bent(Masked):
    """Adds a bias that grows with the square of the distance."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        return -0.1 * ((torch.arange(columns) - columns + 1) ** 2)[None, None, None]


class Kinked(Masked):
    """Adds a bias that stops growing at 2,048 columns."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        return 0.1 * torch.arange(columns).clamp(max=2048)[None, None, None]


class Misplaced(Masked):
    """Adds a bias by the column, padding or not, to a padding mask."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        bias = 0.1 * torch.arange(columns).expand(more[0].shape)
        return bias.masked_fill(more[0] == 0, torch.finfo(torch.float32).min)[:, None, None]


class Faint(Masked):
    """Hides the first column by a number that a large score overcomes."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        return (torch.arange(columns) == 0)[None, None, None] * -100.0


class Late(Masked):
    """Hides one column too many."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        return (more[0].cumsum(-1) > 1)[:, None, None]


class Both(Masked):
    """Looks at the padding from both sides (bidirectional): columns before it stay visible."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        return (more[0] + more[0].flip(-1) != 0)[:, None, None]


class Forgotten(Twin):
    """Applies the padding mask in one of its two attentions."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, (more[0] != 0)[:, None, None], enable_gqa=True)


NOT_CAUSAL = "an attention mask that is not causal with left padding"
NOT_LINEAR = "a bias on attention scores that is not linear in the key's place"


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (Stepped, "// 2"),
        (Hiding, "> columns"),
        (Chunked, "chunk == chunk[-1]"),
        (Banded, "% 2"),
    ],
)
def test_other_masks_are_refused_with_their_source_line(model: type[Toy], line: str) -> None:
    with pytest.raises(UnsupportedGraph) as error:
        run_until(toy_decode(model()), "prove_mask")
    assert error.value.found == NOT_CAUSAL
    assert line in error.value.where


@pytest.mark.parametrize(("model", "line"), [(Bent, "** 2"), (Kinked, "clamp(max=2048)"), (Faint, "-100.0")])
def test_other_biases_are_refused_with_their_source_line(model: type[Toy], line: str) -> None:
    with pytest.raises(UnsupportedGraph) as error:
        run_until(toy_decode(model()), "prove_mask")
    assert error.value.found == NOT_LINEAR
    assert line in error.value.where


def test_a_bias_linear_in_distance_is_found() -> None:
    [nodes] = run_until(toy_decode(Sloped()), "prove_mask").sites
    assert nodes.site.alibi == Alibi(pytest.approx((0.1,) * 4), torch.float32, relative=True)


def test_a_bias_within_a_window_is_found() -> None:
    [nodes] = run_until(toy_decode(SlopedSliding()), "prove_mask").sites
    assert nodes.site.window == 40
    assert nodes.site.alibi == Alibi(pytest.approx((0.1,) * 4), torch.float32, relative=True)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_bias_linear_in_place_is_found_with_the_type_it_was_rounded_to(batch: int) -> None:
    padding = torch.ones(batch, 7, dtype=torch.int64)
    [nodes] = run_until(toy_decode(Placed(), padding, batch=batch), "prove_mask", batch=batch).sites
    assert nodes.site.alibi == Alibi((0.5, 0.25, 0.125, 0.0625), torch.bfloat16, relative=False)


def test_a_bias_by_the_column_of_a_padded_row_is_refused() -> None:
    padding = torch.ones(3, 7, dtype=torch.int64)
    with pytest.raises(UnsupportedGraph, match=NOT_LINEAR):
        run_until(toy_decode(Misplaced(), padding, batch=3), "prove_mask", batch=3)


class Limited(Masked):
    """Cuts its mask out of a table of 600 columns: Dynamo guards on that."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        table = torch.ones(600, 600, dtype=torch.bool).tril()
        return table[columns - 1 : columns, :columns][None, None].expand(1, 1, 1, columns)


class Indexed(Masked):
    """Looks its mask up in such a table: past its end the call fails."""

    def mask(self, columns: int, *more: Tensor) -> Tensor:
        return torch.ones(600, dtype=torch.bool)[torch.arange(columns)][None, None, None]


@pytest.mark.parametrize("model", [Limited, Indexed])
def test_a_length_at_which_the_model_fails_is_a_limit(model: type[Toy]) -> None:
    assert column_limit(run_until(toy_decode(model()), "prove_mask")) == 600


@pytest.mark.parametrize("model", [Late, Both])
@pytest.mark.parametrize("batch", [1, 3])
def test_other_uses_of_the_padding_are_refused(model: type[Toy], batch: int) -> None:
    padding = torch.ones(batch, 7, dtype=torch.int64)
    with pytest.raises(UnsupportedGraph, match=NOT_CAUSAL):
        run_until(toy_decode(model(), padding, batch=batch), "prove_mask", batch=batch)


def test_an_attention_that_leaves_out_the_padding_is_refused() -> None:
    padding, k, v = torch.ones(1, 7, dtype=torch.int64), torch.zeros(1, 2, 6, 8), torch.ones(1, 2, 6, 8)
    call = toy_decode(Forgotten(), k, v, padding)
    with pytest.raises(UnsupportedGraph, match="an attention that leaves out the padding mask"):
        run_until(call, "prove_mask")
