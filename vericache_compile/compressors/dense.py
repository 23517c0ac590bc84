"""A region of whole, uncompressed tokens: what every method that keeps or drops tokens stores.

Shapes: K KV heads, S tokens, N slots kept, D head size, Dv value head size, w queries, H query heads.
"""

from __future__ import annotations

import math

from torch import Tensor

from vericache_compile.compressors.base import CompressedKV
from vericache_compile.errors import OptionError


class DenseKV(CompressedKV):
    """Keys [K, N, D] and values [K, N, Dv] as they are; how to extend them is the method's."""

    def __init__(self, keys: Tensor, values: Tensor, covered: int) -> None:
        """Takes over `keys` and `values`: contiguous tensors that fill storages of their own."""
        assert keys.shape[:2] == values.shape[:2], "keys and values must agree in heads and slots"
        assert _fills_its_storage(keys), "keys must be an owned copy, not a view that keeps the full KV alive"
        assert _fills_its_storage(values), "values must be an owned copy, not a view that keeps the full KV alive"
        self.keys, self.values, self.covered = keys, values, covered

    @property
    def slots(self) -> int:
        """Keys that attention reads from this region (N)."""
        return self.keys.shape[1]

    @property
    def as_cached(self) -> tuple[int, ...]:
        """All slots."""
        return (self.slots,) * self.keys.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, wherever they lie."""
        return self.keys.nbytes + self.values.nbytes

    def materialize(self) -> tuple[Tensor, Tensor]:
        """The stored keys [K, N, D] and values [K, N, Dv] themselves; no copy."""
        return self.keys, self.values

    def move_to(self, keys_out: Tensor, values_out: Tensor) -> None:
        """Copy into the views keys_out [K, N, D] and values_out [K, N, Dv], and live there from now on.

        So the runtime places a region in its draft buffer without holding it twice. The numbers stay the
        same, and whoever owns the buffer leaves these bytes alone until the region was extended or let go.
        """
        assert keys_out.shape == self.keys.shape, f"keys are {self.keys.shape}, not {keys_out.shape}"
        assert values_out.shape == self.values.shape, f"values are {self.values.shape}, not {values_out.shape}"
        own = [
            given.clone() if _share_storage(given, out) else given
            for given, out in ((self.keys, keys_out), (self.values, values_out))
        ]  # before either is written: values may be a part of the keys
        self.keys, self.values = keys_out.copy_(own[0]), values_out.copy_(own[1])


def budget(keep: float, tokens: int) -> int:
    """Slots for `tokens` tokens: keep * tokens rounded up, so at least 1 unless there are none."""
    rounding = 1e-6  # 0.07 * 100 is a little more than 7 in binary
    return max(math.ceil(keep * tokens - rounding), min(tokens, 1))


def check_keep(keep: float, method: str) -> None:
    """Raise OptionError unless `keep` is a fraction in (0, 1]."""
    if not is_number(keep) or not 0 < keep <= 1:
        raise OptionError(f"keep={keep!r}", f"compressor {method!r}", "give the fraction to keep, in (0, 1]")


def is_number(value: object) -> bool:
    """Whether a parameter is a finite number: True and False are none, though Python counts with them."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_count(option: str, value: int, least: int, method: str) -> None:
    """Raise OptionError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{option}={value!r}", f"compressor {method!r}", f"give a whole number from {least} up")


def check_odd(option: str, value: int, method: str) -> None:
    """Raise OptionError unless `value` is an odd number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % 2 == 0:
        raise OptionError(f"{option}={value!r}", f"compressor {method!r}", "give an odd number from 1 up")


def check_seed(value: int, method: str) -> None:
    """Raise OptionError unless `value` is one that torch's generators take."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise OptionError(f"seed={value!r}", f"compressor {method!r}", "give a whole number from 0 to 2**63 - 1")


def _share_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _fills_its_storage(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
