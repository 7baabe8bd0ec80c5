"""Random numbers that the Python loops and their C twins draw alike, to the last bit.

Source: splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
"""

from dataclasses import dataclass

_MASK = 2**64 - 1


@dataclass
class RandomBits:
    """A stream of random numbers.

    Args:
        state: 64 bits: the seed, then the state of the stream.
    """

    state: int

    def __post_init__(self) -> None:
        self.state &= _MASK

    def next(self) -> int:
        """Return 64 random bits."""
        z = self.state = (self.state + 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def below(self, limit: int) -> int:
        """Return a whole number from 0 to limit - 1."""
        return ((self.next() >> 32) * limit) >> 32

    def unit(self) -> float:
        """Return a number strictly between 0 and 1."""
        return (float(self.next() >> 11) + 0.5) * 2.0**-53
