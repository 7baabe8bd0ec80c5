"""Groups a layer's (token, k) pairs by expert, once a call.

The place of a pair's output is token * K + k. Each token's K outputs are written apart and then
summed in the order of K, so that the order in which experts arrive never shows in the result.
"""

import torch

from moeflow.errors import ConfigError


class Dispatch:
    """The (token, expert) pairs of one layer, grouped by expert, tokens in order.

    Args:
        top_k_index: [T, K], expert numbers; num_experts or more means none.
        num_experts: of the layer.
        call_tokens: tokens of the whole call, where these are a part of it; T if None.

    Raises:
        ConfigError: a negative number.
    """

    def __init__(self, top_k_index: torch.Tensor, num_experts: int, call_tokens: int | None = None) -> None:
        self.num_tokens, self.top_k = top_k_index.shape
        self.call_tokens = call_tokens or self.num_tokens
        flat = top_k_index.reshape(-1)
        if self.num_tokens == 1:
            chosen = flat.tolist()
            if chosen and min(chosen) < 0:
                raise _no_expert(min(chosen), num_experts)
            self._places: dict[int, list[int]] = {}
            for place, expert in enumerate(chosen):
                if expert < num_experts:
                    self._places.setdefault(expert, []).append(place)
        else:
            flat = flat.clamp(max=num_experts)  # all that mean none are one
            order = flat.argsort(stable=True).tolist()
            if order and (least := int(flat[order[0]])) < 0:
                raise _no_expert(least, num_experts)
            counts, start = torch.bincount(flat, minlength=num_experts).tolist(), 0
            self._places = {}
            for expert, count in enumerate(counts[:num_experts]):
                if count:
                    self._places[expert] = order[start : start + count]
                start += count
        self.experts = list(self._places)

    @property
    def num_places(self) -> int:
        """T * K."""
        return self.num_tokens * self.top_k

    @property
    def is_whole(self) -> bool:
        """Whether every pair has an expert."""
        return sum(len(places) for places in self._places.values()) == self.num_places

    def places(self, expert: int) -> list[int]:
        """Return where an expert's outputs go; place // K is the token."""
        return self._places[expert]

    def num_tokens_of(self) -> list[int]:
        """Return how many tokens go to each of `experts`."""
        return [len(places) for places in self._places.values()]


def _no_expert(number: int, num_experts: int) -> ConfigError:
    return ConfigError(
        f"a token is routed to expert {number}. Allowed: 0 to {num_experts - 1}, {num_experts} or more for none."
    )
