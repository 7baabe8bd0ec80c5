"""bfloat16 matrices in 12 bits a value, every bit kept: the oracle of the lossless format, in plain torch.

The format is specified in `formats.py`. Knows bits. Knows nothing of models or files.
"""

import torch
import torch.nn.functional as F

from moeflow.errors import CheckpointError
from moeflow.kernels.quantization.formats import LOSSLESS_BLOCK, WeightFormat

ESCAPE = 15  # the code of a value whose exponent is 0, or lies apart
NUM_CODES = 15  # exponents that a row's codes reach, from its top down
UNUSED = 0xFFFFFFFF  # the position of an escape that is none
_HAS_ESCAPES = 1 << 8
_ROOM_BELOW_TOP = 16  # a row keeps its largest exponent as its top while at most this part of it escapes


def _places(device: torch.device) -> torch.Tensor:
    """[64]: the place of each value of a block."""
    value = torch.arange(LOSSLESS_BLOCK, device=device)
    part, lane = value // 16, value % 16
    return 16 * (lane // 4) + 8 * (part // 2) + 2 * (lane % 4) + part % 2


def encode_lossless(weight: torch.Tensor, num_escapes: int | None = None) -> tuple[torch.Tensor, ...]:
    """Store a matrix without loss.

    Args:
        weight: [N, K], bfloat16, any strides.
        num_escapes: room for escapes; as many as there are when None.

    Returns:
        Codes uint8 [N, Kp / 64 * 96], tops uint16 [N], escapes uint8 [5 E].

    Raises:
        ValueError: there are more escapes than room.
    """
    in_features = weight.shape[1]
    bits = weight.contiguous().view(torch.int16).int() & 0xFFFF
    exponents, rests = (bits >> 7) & 255, (bits >> 8) & 128 | bits & 127
    top = _tops(exponents)
    codes = top[:, None] - exponents
    is_far = (codes < 0) | (codes >= NUM_CODES)
    codes, escapes = codes.masked_fill(is_far, ESCAPE), is_far & (exponents != 0)
    padding = (0, -in_features % LOSSLESS_BLOCK)
    place = _places(weight.device)
    values, nibbles = (
        F.pad(part, padding).to(torch.uint8).unflatten(1, (-1, LOSSLESS_BLOCK)) for part in (rests, codes)
    )
    stored, placed = torch.empty_like(values), torch.empty_like(nibbles)
    stored[..., place], placed[..., place] = values, nibbles
    packed = torch.cat((stored, placed[..., :32] | placed[..., 32:] << 4), dim=-1).flatten(1)
    at = escapes.flatten().nonzero().flatten()
    room = len(at) if num_escapes is None else num_escapes
    if len(at) > room:
        raise ValueError(f"{len(at)} escapes, room for {room}")
    positions = F.pad(at, (0, room - len(at)), value=UNUSED)
    found = F.pad(exponents.flatten()[at], (0, room - len(at)))
    stored_at = torch.stack([(positions >> shift) & 255 for shift in (0, 8, 16, 24)], dim=-1).flatten()
    tops = (top + _HAS_ESCAPES * escapes.any(1)).to(torch.uint16)
    return packed, tops, torch.cat((stored_at, found)).to(torch.uint8)


def decode_lossless(
    codes: torch.Tensor, tops: torch.Tensor, escapes: torch.Tensor, spec: WeightFormat, shape: tuple[int, int]
) -> torch.Tensor:
    """Return the matrix that was stored.

    Args:
        codes: uint8 [N, Kp / 64 * 96].
        tops: uint16 [N].
        escapes: uint8 [5 E].
        spec: the format.
        shape: [N, K].

    Returns:
        [N, K], bfloat16.

    Raises:
        CheckpointError: escapes out of order or outside of the matrix, or without their code; a code of no value.
    """
    num_rows, in_features = shape
    blocks = codes.unflatten(1, (-1, 96))
    halves = blocks[..., 64:]
    place = _places(codes.device)
    rests = blocks[..., place].flatten(1)[:, :in_features].int()
    nibbles = torch.cat((halves & 15, halves >> 4), dim=-1)[..., place].flatten(1)[:, :in_features].int()
    top = tops.view(torch.int16).int() & 0xFFFF  # a GPU's torch knows little of uint16
    is_escape = (nibbles == ESCAPE).flatten()
    exponents = ((top & 255)[:, None] - nibbles).flatten().masked_fill(is_escape, 0).view(shape)
    room = spec.num_escapes
    four = escapes[: 4 * room].unflatten(0, (-1, 4)).long() if room else escapes.new_zeros(0, 4).long()
    at = (four << torch.tensor([0, 8, 16, 24], device=codes.device)).sum(-1)
    used = at != UNUSED
    count = int(used.sum())
    at, found = at[:count], escapes[4 * room : 4 * room + count].int()
    _want(bool(used[:count].all()), "unused escapes before used ones")
    _want(bool((at.diff() > 0).all()) and (not count or int(at[-1]) < num_rows * in_features), "escapes out of order")
    _want(bool(is_escape[at].all()) and bool(found.all()), "escapes at other values than the codes say")
    has_escapes = torch.zeros_like(top, dtype=torch.bool).index_fill(0, at // in_features, True)
    _want(torch.equal((top & _HAS_ESCAPES) != 0, has_escapes), "rows that hide their escapes")
    _want(bool((top < 2 * _HAS_ESCAPES).all()), "tops that are no exponents")
    exponents.view(-1)[at] = found
    _want(bool((exponents >= 0).all()), "codes that name no value")
    bits = (rests & 128) << 8 | exponents << 7 | rests & 127
    return (bits - ((bits & 0x8000) << 1)).to(torch.int16).view(torch.bfloat16)


def _tops(exponents: torch.Tensor) -> torch.Tensor:
    """[N]: the exponent from which each row's codes count down."""
    in_features = exponents.shape[1]
    top = exponents.amax(1)
    is_far = (top[:, None] - exponents >= NUM_CODES) & (exponents != 0)
    for row in (is_far.sum(1) * _ROOM_BELOW_TOP > in_features).nonzero().flatten():
        counts = torch.bincount(exponents[row], minlength=256)
        counts[0] = 0  # which needs no code
        counts = F.pad(counts, (NUM_CODES - 1, 0))
        reached = counts.unfold(0, NUM_CODES, 1).sum(1)  # by each top
        top[row] = int((reached == reached.max()).nonzero().max())
    return top


def _want(is_so: bool, what: str) -> None:
    if not is_so:
        raise CheckpointError(f"a lossless matrix has {what}. The file is damaged: fetch or pack it again.")
