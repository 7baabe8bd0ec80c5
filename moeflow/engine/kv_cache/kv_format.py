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
class KeyValueFormat:
    """A format of records.

    Args:
        name: "int8" or "int4".
        number: in the compiled library.
        most: the largest code; the smallest is its negative.
    """

    name: str
    number: int
    most: int

    def record_bytes(self, features: int) -> int:
        """Return the bytes of one head of one position."""
        codes = features if self.most > 7 else features // 2
        return codes + _SCALE_BYTES * -(-features // _GROUP)

    def encode(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the records [..., record_bytes] of keys or values [..., features], uint8, on the same device.

        A code is half a scale away from its number at most. A group with a number that is not finite, or whose scale is
        beyond float16's range, is read as NaN.
        """
        x = tensor.float()
        features = x.shape[-1]
        x = torch.nn.functional.pad(x, (0, -features % _GROUP)).unflatten(-1, (-1, _GROUP))
        scales = (x.abs().amax(-1) * (1 / self.most)).half()
        steps = scales.float()[..., None]
        is_used = (steps > 0) & (steps < torch.inf)
        codes = torch.where(is_used, (x * (1 / steps)).round().clamp(-self.most, self.most), 0)
        codes = codes.to(torch.int8).flatten(-2)[..., :features]
        if self.most == 7:
            codes = torch.cat([_pair(part) for part in codes.split(_GROUP, -1)], -1)
        return torch.cat([codes.contiguous().view(torch.uint8), scales.contiguous().view(torch.uint8)], -1)

    def decode(self, records: torch.Tensor, features: int, dtype: torch.dtype) -> torch.Tensor:
        """Return what records [..., record_bytes] stand for, [..., features], rounded to a dtype."""
        num_codes = self.record_bytes(features) - _SCALE_BYTES * -(-features // _GROUP)
        stored, scales = records[..., :num_codes], records[..., num_codes:]
        if self.most == 7:
            codes = torch.cat([_unpair(part) for part in stored.split(_GROUP // 2, -1)], -1)
        else:
            codes = stored.view(torch.int8)
        steps = scales.contiguous().view(torch.float16).float().repeat_interleave(_GROUP, -1)[..., :features]
        return codes.to(torch.float32).mul_(steps).to(dtype)


def _pair(codes: torch.Tensor) -> torch.Tensor:
    """Pack a group's codes, -7 to 7: the first half in the low four bits, the second in the high ones, each plus 8."""
    low, high = (codes + 8).chunk(2, -1)
    return low | high << 4


def _unpair(stored: torch.Tensor) -> torch.Tensor:
    return torch.cat([(stored & 15).to(torch.int8), (stored >> 4).to(torch.int8)], -1) - 8


FORMATS = {one.name: one for one in (KeyValueFormat("int8", 1, 127), KeyValueFormat("int4", 2, 7))}
"""By name."""


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
