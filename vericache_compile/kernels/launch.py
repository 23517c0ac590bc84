"""Where the Triton kernels run, and the sizes they are launched with. Triton is imported by the first launch.

A CUDA build of torch brings triton; a CPU needs none. VERICACHE_KERNELS=0 leaves everything to torch's kernels.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

DEVICE = "cuda"
"""The type of device that kernels are launched on."""
TYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)
"""The least compute capability: that of the first GPUs that multiply bfloat16."""
REFUSED = "vericache: none of its kernels run on this device: %s\n  where: %s\n  fix: %s"
INSTEAD = "torch's kernels run, and what verify gives may differ in the last bits from place to place in a window"
LEAST = 16
"""The smallest side of a tile that a matrix product takes."""


def serves(tensor: Tensor) -> bool:
    """Whether the kernels are for tensors like this one, and there."""
    return takes(tensor.device, tensor.dtype)


def takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels are for tensors of a device and a type, and there."""
    return device.type == DEVICE and dtype in TYPES and installed() and suits(device)


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch where a tensor lies: triton launches on the current GPU, whatever it is given."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def installed() -> bool:
    """Whether triton can be imported; said once where it cannot."""
    if os.environ.get("VERICACHE_KERNELS") == "0":
        return False
    if importlib.util.find_spec("triton") is not None:
        return True
    log.warning(
        REFUSED,
        "triton is not installed",
        __name__,
        f"pip install triton, which a CUDA build of torch brings; until then {INSTEAD}",
    )
    return False


@cache
def suits(device: torch.device) -> bool:
    """Whether a device is one that the kernels are for; said once where it is not."""
    if device.type != "cuda":
        return True
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability >= CAPABILITY:
        return True
    found = "is not of NVIDIA's" if torch.version.hip else "has compute capability {}.{}".format(*capability)
    fix = f"use an NVIDIA GPU of compute capability 8.0 or more; on this one {INSTEAD}"
    log.warning(REFUSED, f"it {found}", device, fix)
    return False


def pad_size(size: int) -> int:
    """The extent of a tile that holds `size` numbers: a power of two, 16 or more."""
    return max(LEAST, 1 << (size - 1).bit_length())
