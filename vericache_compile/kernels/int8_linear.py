"""Products of a few rows with weights in int8, for drafts on the CPU: a scale per 32 inputs, as in GGML's Q8_0.

The kernel multiplies in float32, and takes as long as it takes to read the weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vericache_compile.kernels import native
from vericache_compile.kernels.calls import call, side_by_side

GROUP = 32
"""Inputs of a weight that share the scale of their codes."""
OUTPUTS = 16
"""Outputs whose codes lie side by side."""


class Weight(ctypes.Structure):
    """`struct Int8Weight` of the C++ file."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("outs", ctypes.c_int64),
    ]


def serves(device: torch.device) -> bool:
    """Whether the kernel is for weights on a device, and there."""
    return device.type == "cpu" and native.load() is not None


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [T, in, 16] (int8) and scales [T, in / 32, 16] (bfloat16) of a weight [out, in]: tiles of 16 outputs.

    Symmetric, round to nearest: w = code * scale, scale = max|w| / 127. Both sizes are filled up with zeros.
    """
    outs, size = weight.shape
    padded = F.pad(weight.float(), (0, -size % GROUP, 0, -outs % OUTPUTS))
    groups = padded.view(-1, OUTPUTS, padded.shape[1] // GROUP, GROUP)
    least = torch.finfo(torch.float32).tiny
    scales = (groups.abs().amax(-1, keepdim=True).clamp_(min=least) / 127).to(torch.bfloat16)
    codes = (groups / scales.float()).round_().to(torch.int8)
    return codes.permute(0, 2, 3, 1).flatten(1, 2).contiguous(), scales[..., 0].transpose(1, 2).contiguous()


def int8_linear(x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], outs: Sequence[int]) -> list[Tensor]:
    """x [M, in] (float32) by each weight that `quantize` made codes and scales of. Returns [M, outs[i]] for each."""
    library = native.load()
    assert library is not None, "ask `serves` first"
    assert x.dtype is torch.float32, "the kernel reads float32 numbers"
    x = side_by_side(x)
    rows, inputs = x.shape
    groups = scales[0].shape[1]
    made = [x.new_empty((rows, count)) for count in outs]
    weights = (Weight * len(made))()
    for weight, code, scale, out in zip(weights, codes, scales, made, strict=True):
        assert inputs <= code.shape[1] == groups * GROUP, f"rows of {inputs} numbers by codes for {code.shape[1]}"
        weight.codes, weight.scales, weight.out = code.data_ptr(), scale.data_ptr(), out.data_ptr()
        weight.outs = out.shape[1]
    work = x.new_empty(rows * groups * GROUP)
    threads = torch.get_num_threads()
    call(library.multiply_int8, x, rows, inputs, groups, weights, len(made), work, threads, held=(codes, scales, made))
    return made


def int8_linear_reference(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], outs: Sequence[int]
) -> list[Tensor]:
    """The same, by torch's operators."""
    made = []
    for code, scale, count in zip(codes, scales, outs, strict=True):
        read = code.view(scale.shape[0], -1, GROUP, OUTPUTS) * scale.float()[:, :, None]
        weight = read.permute(0, 3, 1, 2).flatten(0, 1).flatten(1)
        made.append(x @ weight[:count, : x.shape[1]].t())
    return made
