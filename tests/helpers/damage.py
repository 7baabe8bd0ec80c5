"""Damage as disks, copies and editors do it: bits, bytes, zeroed ranges, cut ends, doubled parts."""

import random

_LIKELY = b'0123456789{}[],:-.eE"\\ \xff'


def damaged(content: bytes, rng: random.Random, head: int) -> bytes:
    """Return a content with one kind of damage, half of the times within its first `head` bytes."""
    data, kind = bytearray(content), rng.randrange(5)
    place = rng.randrange(rng.choice([head, len(data)]))
    if kind == 0:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        for _ in range(rng.randrange(1, 8)):
            data[rng.randrange(rng.choice([head, len(data)]))] = rng.choice(_LIKELY)
    elif kind == 2:
        del data[place:]
    elif kind == 3:
        size = rng.randrange(1, 100)
        data[place : place + size] = rng.choice([bytes(size), rng.randbytes(size), b"9" * size, b"[" * size])
    else:
        data[place:place] = data[place : place + rng.randrange(1, 50)]
    return bytes(data)
