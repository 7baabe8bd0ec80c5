"""Experts that the CPU computes where they lie, in the pinned host tier, while copies to the device run.

Asks `MissSplit` which ones, keeps them in their host slots meanwhile, and measures both ways. Knows nothing of the
device's slots. Its logic is tested on the CPU; the gain is not yet measured on a GPU.
"""

import time
from typing import Protocol

from moeflow.core import ExpertKey, RecordLayout
from moeflow.offload.host_tier import HostTier
from moeflow.offload.slot_pool import Resident
from moeflow.offload.transfers import Transfers
from moeflow.policy.cache import ExpertCache
from moeflow.policy.miss_split import MissSplit


class HostTokens(Protocol):
    """The tokens of one layer on their way to host memory, for experts that are computed there."""

    def send(self) -> None:
        """Start their copy; compute that is queued later does not delay it."""

    def wait(self) -> object:
        """Block until they are there."""


class HostCompute:
    """Chooses, pins and measures the experts of one layer at a time.

    Args:
        split: decides how many.
        host: the tier in which the experts lie.
        transfers: the copies that run beside.
    """

    def __init__(self, split: MissSplit, host: HostTier, transfers: Transfers) -> None:
        self._split = split
        self._host = host
        self._transfers = transfers
        self._num_tokens: dict[ExpertKey, int] = {}  # of experts chosen and not yet computed; they are pinned
        # Every copy in flight may need a host slot of its own.
        self._max_experts = host.pool.num_slots - transfers.max_in_flight
        self._began_s, self._beside = 0.0, False

    def choose(
        self, absent: list[ExpertKey], num_tokens: dict[ExpertKey, int], cache: ExpertCache, num_bytes: int
    ) -> list[ExpertKey]:
        """Choose which experts the CPU computes; they stay in their host slots until `finish` or `release`.

        Args:
            absent: experts of one layer that are not on the device and not in flight.
            num_tokens: tokens that go to each.
            cache: the device's, which counts how often each was needed.
            num_bytes: of one of them.

        Returns:
            The experts in the order of use: of those with equally many tokens, the most used come first, because one
            of them may get a slot on the device.
        """
        for transfer in self._transfers.take_copied():
            self._split.copied(transfer.num_bytes, transfer.seconds, beside=transfer.beside)
        host = self._host.cache
        near = [key for key in absent if key in host]
        near.sort(key=lambda key: (num_tokens[key], cache.uses(key)))
        able = near[: self._max_experts]
        num_ahead = self._transfers.num_on_link + len(near) - len(able)
        chosen = able[: self._split.split([num_tokens[key] for key in able], num_bytes, num_ahead)][::-1]
        host.touch(chosen)
        for key in chosen:
            host.pin(key)
        self._num_tokens = {key: num_tokens[key] for key in chosen}
        return chosen

    def start(self, key: ExpertKey, record: RecordLayout) -> Resident:
        """Return where a chosen expert lies in host memory, and start the clock."""
        self._beside = self._transfers.compute_beside()
        self._began_s = time.perf_counter()
        return Resident(key.expert, self._host.pool, self._host.cache.slot(key), record, on_host=True)

    def finish(self, key: ExpertKey, num_bytes: int) -> float:
        """Free the host slot of an expert that was computed; return the seconds it took."""
        seconds = time.perf_counter() - self._began_s
        self._split.computed(num_bytes, self._num_tokens.pop(key), seconds, beside=self._beside)
        self._host.cache.unpin(key)
        return seconds

    def release(self) -> None:
        """Free the host slots of the experts that were chosen and not computed."""
        while self._num_tokens:
            self._host.cache.unpin(self._num_tokens.popitem()[0])

    def as_dict(self) -> dict[str, float | None]:
        """Return the bandwidths that decide; see `MissSplit.as_dict`."""
        return self._split.as_dict()
