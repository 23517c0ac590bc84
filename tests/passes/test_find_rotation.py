"""The rotation by position is cut out of the graph whatever order of channels a model keeps, and runs both ways."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from graphs import Captured, Toy, capture, run_until, tiny_decode, toy_decode
from torch import Tensor
from torch.fx import Interpreter
from transformers import AutoConfig, AutoModelForCausalLM

from vericache_compile.compressors.rotation import Rotation
from vericache_compile.passes.find_rotation import find_rotation
from vericache_compile.passes.program import Program
from vericache_compile.plan import Site
from vericache_compile.runtime.rotations import Probe

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi": {"partial_rotary_factor": 0.5},
    "cohere": {},
    "glm": {"head_dim": 16, "pad_token_id": 0},
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
"""Halves turned together, part of the channels, neighbours, neighbours of a part, halves that one call cuts apart."""


@cache
def decode_of(kind: str) -> Captured:
    """The decode step of a tiny model of a kind."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | KINDS[kind])).eval()
    ids = torch.arange(1, 8)[None]

    def drive(model: Any) -> None:
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)

    return capture(model, drive)[-1]


def rotation_of(program: Program, captured: Captured, layer: int = 0) -> Rotation | None:
    rope, site = program.rotations[layer], program.sites[layer].site
    assert rope is not None
    weights = [captured.inputs[i] for i in rope.weights]
    return Probe(rope, weights, site, program.batch, program.position_limit, CPU).rotation()


def first_key(program: Program, captured: Captured, position: int) -> Tensor:
    """The key [K, D] that the first layer gives the same token at a position."""
    inputs = list(captured.inputs)
    assert program.found_roles.positions is not None
    inputs[program.found_roles.positions] = torch.tensor([[position]])
    runner = Interpreter(program.module, garbage_collect_values=False)
    runner.run(*inputs)
    return runner.env[program.sites[0].key][0, :, 0]


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "llama")])
def test_turning_back_gives_the_key_at_position_zero(kind: str) -> None:
    captured = decode_of(kind)
    program = run_until(captured, "find_rotation")
    rotation = rotation_of(program, captured)
    assert rotation is not None
    start = first_key(program, captured, 0)
    for position in (1, 9, 40):
        turned = first_key(program, captured, position)
        assert not torch.allclose(turned, start, atol=1e-3)
        back = rotation.unrotate(turned[:, None], position)[:, 0]
        torch.testing.assert_close(back, start, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rotation.rotate(start[:, None], position)[:, 0], turned, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_layers_that_rotate_alike_share_one(batch: int) -> None:
    program = run_until(tiny_decode("llama", batch), "find_rotation", batch=batch)
    assert find_rotation(program) == 3
    assert len(set(map(id, program.rotations))) == 1


def test_learned_positions_are_no_rotation() -> None:
    assert run_until(tiny_decode("gpt2", 1), "find_rotation").rotations == [None, None, None]


class Scaled(Toy):
    """Keys whose channels a position mixes, all with all."""

    def forward(self, ids: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(ids)
        q, new_k, new_v = self.project(x)
        new_k = (new_k * (1 + self.positions(ids, k)[:, None, :, None])).cumsum(-1)
        keys, values = self.append(k, new_k), self.append(v, new_v)
        return self.finish(x + self.attend(q, keys, values).transpose(1, 2).flatten(2), k), keys, values


def test_what_is_no_turn_of_pairs_is_not_taken_for_one() -> None:
    captured = toy_decode(Scaled())
    program = run_until(captured, "find_rotation")
    assert program.rotations[0] is not None
    assert rotation_of(program, captured) is None


def test_a_mean_turn_is_the_mean_of_turns() -> None:
    captured = decode_of("llama")
    rotation = rotation_of(run_until(captured, "find_rotation"), captured)
    assert rotation is not None
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = rotation.mean(3, 20)
    expected = torch.stack([rotation.rotate(x, position)[0] for position in range(3, 23)]).mean(0)
    torch.testing.assert_close((x * cos + x[:, rotation.pairs] * sin)[0], expected)


def test_a_limit_is_never_passed() -> None:
    captured = decode_of("llama")
    program = run_until(captured, "find_rotation")
    rope = program.rotations[0]
    assert rope is not None
    site: Site = program.sites[0].site
    rotation = Probe(rope, [captured.inputs[i] for i in rope.weights], site, 1, 10, CPU).rotation()
    assert rotation is not None
    assert torch.equal(*(rotation.at(position, 1)[0] for position in (9, 300)))
