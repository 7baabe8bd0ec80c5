"""Formats in which keys and values are kept: int8 and int4 records, one of each head of each position.

A record is that head's codes, then a float16 scale for each group of 32 channels; 16 are left over where their number
asks for it. So a position can be copied, cut off, shared and written alone, and whoever moves records need not know
what is in them. `kernels/cpu/_step_kept.h` writes the same bits.

Knows tensors. Knows nothing of slots, sequences or models.
"""

from dataclasses import dataclass

import torch

from moeflow.errors import ConfigError

_GROUP = 32
_LEAST = 16  # channels of the last group
_MOST = 512  # channels of a head in the compiled library
_SCALE_BYTES = 2


@dataclass(frozen=True)
class RecordFormat:
    """A format of records.

    Args:
        bits: of a code, 8 or 4.
        codes: the smallest and the largest one.
        end: the code of the number that is the largest in size of its group.
    """

    bits: int
    codes: tuple[int, int]
    end: int

    def code_bytes(self, features: int) -> int:
        """Return the bytes of a head's codes."""
        return features * self.bits // 8

    def record_bytes(self, features: int) -> int:
        """Return the bytes of one head of one position."""
        return self.code_bytes(features) + _SCALE_BYTES * -(-features // _GROUP)

    def encode(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the records [..., record_bytes] of keys or values [..., features], uint8, on the same device.

        A number is half a scale off at most, or a scale where the code beside the last one is not there. A group with a
        number that is not finite, or whose scale is beyond float16's range, is read as NaN.
        """
        x = tensor.float()
        features = x.shape[-1]
        x = torch.nn.functional.pad(x, (0, -features % _GROUP)).unflatten(-1, (-1, _GROUP))
        largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))  # the first of equal ones
        scales = (largest * (1 / self.end)).half()
        steps = scales.float()
        is_used = (steps != 0) & steps.isfinite()
        codes = torch.where(is_used, (x * (1 / steps)).round().clamp(*self.codes), 0)
        codes = codes.to(torch.int8).flatten(-2)[..., :features]
        if self.bits == 4:
            codes = torch.cat([_pair(part) for part in codes.split(_GROUP, -1)], -1)
        return torch.cat([_viewed(codes, torch.uint8), _viewed(scales[..., 0], torch.uint8)], -1)

    def decode(self, records: torch.Tensor, features: int, dtype: torch.dtype) -> torch.Tensor:
        """Return what records [..., record_bytes] stand for, [..., features], rounded to a dtype."""
        num_codes = self.code_bytes(features)
        stored, scales = records[..., :num_codes], records[..., num_codes:]
        if self.bits == 4:
            codes = torch.cat([_unpair(part) for part in stored.split(_GROUP // 2, -1)], -1)
        else:
            codes = stored.view(torch.int8)
        steps = _viewed(scales, torch.float16).float().repeat_interleave(_GROUP, -1)[..., :features]
        return codes.to(torch.float32).mul_(steps).to(dtype)


@dataclass(frozen=True)
class KeyValueFormat:
    """A format of keys and values.

    Args:
        name: as the value of `kv_format`.
        number: in the compiled library.
        key: of keys' records.
        value: of values' records.
    """

    name: str
    number: int
    key: RecordFormat
    value: RecordFormat


_INT8, _INT4 = RecordFormat(8, (-127, 127), 127), RecordFormat(4, (-8, 7), -8)
FORMATS = {one.name: one for one in (KeyValueFormat("int8", 1, _INT8, _INT8), KeyValueFormat("int4", 2, _INT8, _INT4))}
"""By name. In "int4" only values have 4 bits: keys of 4 bits cost too much (docs/kv_cache.md)."""


def _viewed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the bytes of a tensor as another dtype's."""
    return tensor.clone(memory_format=torch.contiguous_format).view(dtype)


def _pair(codes: torch.Tensor) -> torch.Tensor:
    """Pack a group's codes: the first half in the low four bits, the second in the high ones, each plus 8."""
    low, high = (codes + 8).chunk(2, -1)
    return low | high << 4


def _unpair(stored: torch.Tensor) -> torch.Tensor:
    return torch.cat([(stored & 15).to(torch.int8), (stored >> 4).to(torch.int8)], -1) - 8


def kv_format_of(option: str | None, model: object) -> str:
    """Return the name of a format: the option of an engine, or what its model was loaded with."""
    return getattr(model, "_moeflow_kv_format", "auto") if option is None else option


def format_named(name: str) -> KeyValueFormat | None:
    """Return a format by the value of `kv_format`; None for "auto", the model's dtype.

    Raises:
        ConfigError: there is no such format.
    """
    if name == "auto":
        return None
    if name not in FORMATS:
        raise ConfigError(f"kv_format={name!r:.80} is unknown. Allowed: auto, {', '.join(FORMATS)}.")
    return FORMATS[name]


def check_features(form: KeyValueFormat, features: int) -> None:
    """Refuse heads whose channels fill no groups, or too many.

    Raises:
        ConfigError: the number of channels is no multiple of 16, or beyond 512.
    """
    if features % _LEAST or features > _MOST:
        raise ConfigError(
            f'kv_format="{form.name}" is not possible: head size {features} is no multiple of {_LEAST} up to {_MOST}. '
            'Leave kv_format="auto".'
        )
