"""A window is one more axis of the same calls: as many products, none over copied weights, equal numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import Toy, calls_of, run_until, run_variant, take_steps, toy_decode
from torch import Tensor, nn

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.expand_window import find_expanded, find_gemms
from vericache_compile.passes.program import placeholders, target_name
from vericache_compile.passes.split_modes import LEADING

MOVES = {"view", "permute", "squeeze", "unsqueeze", "clone", "split", "getitem", "slice", "alias", "expand"}


def work_of(program: object, mode: str) -> list[str]:
    """Calls of a variant that compute something."""
    names = [name.split(".")[0] for name in calls_of(program.variants[mode])]
    return [name for name in names if name not in MOVES]


@pytest.mark.parametrize("batch", [1, 3])
def test_verify_does_the_work_of_draft_once_for_all_tokens(batch: int) -> None:
    program = run_until(toy_decode(Toy(), batch=batch), "expand_window", batch=batch)
    layer = ["embedding", "embedding", "add", "linear", "linear", "attend", "add", "linear"]
    assert work_of(program, "verify") == layer
    assert work_of(program, "draft") == [*layer, "argmax"]


def test_inputs_keep_their_roles_and_gain_a_window_where_they_differ_over_it() -> None:
    program = run_until(toy_decode(Toy(), batch=3), "expand_window", batch=3, window=8)
    for mode, window in (("draft", ()), ("verify", (8,))):
        inputs = placeholders(program.variants[mode])
        assert [node.meta["role"] for node in inputs[:4]] == list(LEADING)
        shapes = [tuple(node.meta["val"].shape) for node in inputs[:4]]
        assert shapes == [(*window, 3, 1), (*window, 3, 1), (3,), (3,)]
        for node in inputs[4:]:
            captured = program.placeholders[node.meta["captured_input"]].meta["example_value"]
            assert node.meta["val"].shape[-1] == captured.shape[-1]
    attend = next(node for node in program.variants["verify"].graph.nodes if target_name(node) == "attend.default")
    assert [tuple(node.meta["val"].shape) for node in attend.args[:3]] == [(3, 4, 8, 8), (3, 2, 8, 8), (3, 2, 8, 8)]


class Spelled(Toy):
    """Spells its last product in some way."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(32, self.vocabulary))
        self.bias = nn.Parameter(torch.randn(self.vocabulary))


class Operator(Spelled):
    """x @ w."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return x @ self.matrix


class Method(Spelled):
    """x.matmul(w)."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return x.matmul(self.matrix)


class Function(Spelled):
    """F.linear with names."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return F.linear(x, weight=self.matrix.t(), bias=self.bias)


class Shared(Spelled):
    """F.linear with one bias for all outputs."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return F.linear(x, self.matrix.t(), self.bias[:1])


class Addmm(Spelled):
    """The layer of GPT-2."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, 32), self.matrix).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model", [Operator, Method, Function, Shared, Addmm])
def test_a_product_is_one_product_however_it_is_spelled(model: type[Toy], batch: int) -> None:
    captured = toy_decode(model(), batch=batch)
    program = run_until(captured, "expand_window", batch=batch)
    for mode in ("draft", "verify"):
        assert len(find_gemms(program.variants[mode])) == 3
    assert "linear" in work_of(program, "verify")[-2:]
    assert_rows_equal_steps(program, captured)


def assert_rows_equal_steps(program: object, captured: object, window: int = 4) -> None:
    """Every row of verify is what one-token decoding gives, and draft's token its argmax."""
    steps = take_steps(program, captured, window)
    [logits] = run_variant(program, "verify", captured, steps, window)
    torch.testing.assert_close(logits, torch.stack([rows[0] for rows in steps.rows]), atol=1e-5, rtol=1e-5)
    [token] = run_variant(program, "draft", captured, steps, 0)
    assert torch.equal(token, steps.rows[0][0].argmax(-1))


class Rotary(Toy):
    """Angles as an outer product of expanded frequencies and positions (transformers before 5.20)."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        places = self.positions(x, past)
        frequencies = self.to_logits.bias[None, :, None].float().expand(places.shape[0], -1, 1)
        angles = (frequencies @ places[:, None, :].float()).transpose(1, 2)
        return self.to_logits(x) * angles.cos()


@pytest.mark.parametrize("batch", [1, 3])
def test_an_outer_product_is_no_product_with_a_weight(batch: int) -> None:
    captured = toy_decode(Rotary(), batch=batch)
    program = run_until(captured, "expand_window", batch=batch)
    assert len(find_gemms(program.variants["verify"])) == 3
    assert_rows_equal_steps(program, captured)


class Headed(Toy):
    """Returns rows of a second head beside logits, as models with a value or reward head do."""

    def __init__(self) -> None:
        super().__init__()
        self.to_value = nn.Linear(self.vocabulary, 1)

    def forward(self, ids: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        """Logits, values [B, T, 1], and the grown cache."""
        logits, *cache = super().forward(ids, *given)
        return logits, self.to_value(logits), *cache


@pytest.mark.parametrize("batch", [1, 3])
def test_draft_leaves_out_what_only_other_rows_need(batch: int) -> None:
    captured = toy_decode(Headed(), batch=batch)
    program = run_until(captured, "expand_window", batch=batch)
    assert [len(find_gemms(program.variants[mode])) for mode in ("draft", "verify")] == [3, 4]
    steps = take_steps(program, captured, 4)
    made = run_variant(program, "verify", captured, steps, 4)
    for rows, expected in zip(made, zip(*steps.rows, strict=True), strict=True):
        torch.testing.assert_close(rows, torch.stack(expected), atol=1e-5, rtol=1e-5)


class Mixed(Toy):
    """Enters autocast itself, for its logits."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.to_logits(x)


@pytest.mark.parametrize("model", [Toy, Mixed])
def test_products_are_of_the_type_that_autocast_gives_them(model: type[Toy]) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=model is Toy):
        captured = toy_decode(model(), batch=3)
        program = run_until(captured, "expand_window", batch=3)
        steps = take_steps(program, captured, 4)
        [logits] = run_variant(program, "verify", captured, steps, 4)
    expected = torch.stack([rows[0] for rows in steps.rows])
    assert logits.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(logits, expected, atol=0.04, rtol=0.02)  # a few units in the last place


class InPlace(Toy):
    """Changes hidden states in place."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        x += self.to_q(x)
        x.mul_(2)
        x[..., 0] = 1
        return self.to_logits(x)


def test_changes_in_place_become_values() -> None:
    captured = toy_decode(InPlace())
    program = run_until(captured, "expand_window")
    names = [name.split(".")[0] for mode in ("draft", "verify") for name in calls_of(program.variants[mode])]
    assert not any(name.endswith("_") for name in names)
    assert_rows_equal_steps(program, captured)


@torch.library.custom_op("toys::expert_mm", mutates_args=())
def expert_mm(x: Tensor, weight: Tensor) -> Tensor:
    """A product that torch can only run token by token."""
    return x @ weight


expert_mm.register_fake(lambda x, weight: x @ weight)


class Expert(Spelled):
    """Multiplies by an operator without a rule for windows."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return expert_mm(x, self.matrix)


class Copied(Spelled):
    """Multiplies each row by its own copy of the weight."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return torch.bmm(x, self.matrix.expand(x.shape[0], -1, -1))


class Out(Toy):
    """Writes over its hidden states by name, and reads them."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        torch.mul(x, 2, out=x)
        return self.to_logits(x)


class Noisy(Toy):
    """Draws a random number per token."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return self.to_logits(x + torch.rand_like(x))


@pytest.mark.parametrize(
    ("model", "found", "line"),
    [
        (Expert, "a product with weights that a window cannot share among its tokens", "expert_mm(x, self.matrix)"),
        (Copied, "a product with weights that are copied for each token of a window", "torch.bmm"),
        (Out, "a call that a window cannot be put through", "out=x"),
        (Noisy, "a call that a window cannot be put through", "torch.rand_like(x)"),
    ],
)
def test_a_graph_is_refused_with_its_reason_and_source_line(model: type[Toy], found: str, line: str) -> None:
    with pytest.raises(UnsupportedGraph, match=found) as error:
        run_until(toy_decode(model(), batch=3), "expand_window", batch=3)
    assert line in error.value.where


def test_expanded_operands_are_seen() -> None:
    program = run_until(toy_decode(Toy()), "expand_window")
    assert find_expanded(program.variants["verify"]) == []
