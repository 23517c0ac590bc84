"""Verify's segments between attention sites, each recorded at its second run and replayed from then on, as a CUDA graph
or, on the CPU, as calls.

Attention and transfers between them are launched as they are: full KV moves, when it grows and from place to place in
the ring, so that what reads it could not be replayed. Nothing else does, so growth records nothing anew. A plan is for
one batch and one window, and so are its recordings.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vericache_compile.kernels import launch, native
from vericache_compile.kernels.calls import recording
from vericache_compile.ops import WANTED
from vericache_compile.plan import Act, Compiled, DecodePlan, Step
from vericache_compile.runtime.capture import Captured, Pool
from vericache_compile.runtime.host_capture import is_inductors, recordable

Bound = list[Tensor | None]
"""Slots of the verify program with its weights in place."""
ALL = (1 << 31) - 1
"""Tokens that are wanted where nobody says how many."""
MANY = 64
"""Rows of a window and batch up to which recordings are taken on the CPU."""
LATEST = 4
"""Plans whose recordings are kept."""


def serves(device: torch.device, plan: DecodePlan, batch: int = 1) -> bool:
    """Whether verify's segments are recorded: with our kernels, where none reads numbers back. On the CPU memory
    for what a segment computes is its recording's own, so recordings are taken of few rows: those that Python slows."""
    if plan.verify.waits_for_host or (device.type == "cpu" and batch * plan.window > MANY):
        return False
    return all(launch.takes(device, site.dtype) for site in plan.captured.sites) or makes_calls(device, plan)


def makes_calls(device: torch.device, plan: DecodePlan) -> bool:
    """Whether segments on the CPU may do nothing but calls that can be recorded: Inductor compiled them."""
    return device.type == "cpu" and native.load() is not None and is_inductors(plan.verify)


class Recordings:
    """Decode plans with recorded segments, by the plans that they were made from."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[DecodePlan, list[int], DecodePlan]] = {}

    def of(self, plan: DecodePlan, device: torch.device, bound: Bound) -> DecodePlan:
        """The plan with its verify in pieces: always the same one, until its weights are elsewhere.

        Recordings read them where they are. As pieces share memory, all are recorded anew then, in their order.
        """
        places = [tensor.data_ptr() for tensor in bound if tensor is not None]
        held = self._held.get(id(plan))
        if held is None or held[1] != places:
            self._held.pop(id(plan), None)
            while len(self._held) >= LATEST:
                del self._held[next(iter(self._held))]
            held = self._held[id(plan)] = plan, places, in_pieces(plan, device)
        return held[2]


def in_pieces(plan: DecodePlan, device: torch.device) -> DecodePlan:
    """The plan with verify's segments replaced by pieces that give the same."""
    calls = makes_calls(device, plan)
    shared, verify = _Shared(device, calls), recordable(plan.verify) if calls else plan.verify
    weights = {slot for slot, _, _ in verify.weights}
    outputs = set(verify.outputs)

    def piece(step: Step) -> Step:
        if step.run is None:
            return step
        own, leave = [slot not in weights for slot in step.inputs], [slot in outputs for slot in step.outputs]
        return replace(step, run=Piece(step.run, own, leave, shared))

    steps = tuple(piece(step) if step.act is Act.RUN else step for step in verify.steps)
    return replace(plan, verify=replace(verify, steps=steps))


class _Shared:
    """What the pieces of one program share."""

    def __init__(self, device: torch.device, calls: bool = False) -> None:
        self.device, self.calls = device, calls
        self.wanted = (ctypes.c_int64 * 1)()
        """Where replayed calls read how many tokens there are."""
        self.pool = Pool()
        self.made: dict[int, Sequence[Tensor]] = {}
        """By piece what its replays give: always the same tensors, which later pieces read where they lie."""


class Piece:
    """A segment whose inputs are copied to fixed places, but for weights and what earlier pieces leave at theirs.

    What it gives is overwritten when it runs again, but for the program's own outputs.
    """

    def __init__(self, run: Compiled, own: Sequence[bool], leave: Sequence[bool], shared: _Shared) -> None:
        """`own` says which inputs are no weights, `leave` which outputs are the program's."""
        self._run, self._own, self._leave, self._shared = run, own, leave, shared
        self._warm = False
        self._inputs: list[Tensor] | None = None
        self._captured: Captured[Sequence[Tensor]] = Captured(
            shared.device, "a part of verify", shared.pool, calls=shared.calls
        )

    def __call__(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        if not self._warm or (self._shared.pool.failed and not self._captured.replays):
            self._warm = True
            return self._captured(lambda: self._run(inputs))
        if self._inputs is None:
            self._inputs = [self._place(given) if own else given for given, own in zip(inputs, self._own, strict=True)]
        held = self._inputs
        for place, given, own in zip(held, inputs, self._own, strict=True):
            if own and place is not given:
                place.copy_(given)
        wanted = WANTED.get()
        self._shared.wanted[0] = wanted if isinstance(wanted, int) else ALL
        made = self._captured(lambda: self._launch(list(held)))
        if self._captured.replays:
            self._shared.made[id(self)] = made
        return [each.clone() if leaves else each for each, leaves in zip(made, self._leave, strict=True)]

    def _launch(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        """The segment; calls that are recorded read how many tokens there are when they run."""
        if recording() is None:
            return self._run(inputs)
        before = WANTED.set(self._shared.wanted)
        try:
            return self._run(inputs)
        finally:
            WANTED.reset(before)

    def _place(self, given: Tensor) -> Tensor:
        if any(given is each for made in self._shared.made.values() for each in made):
            return given
        with torch.inference_mode(False):
            return given.clone()
