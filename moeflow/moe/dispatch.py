"""Groups a layer's (token, k) pairs by expert, once a call.

The place of a pair's output is token * K + k. Each token's K outputs are written apart and then
summed in the order of K, so that the order in which experts arrive never shows in the result.
"""

import torch


class Dispatch:
    """The (token, expert) pairs of one layer, grouped by expert, tokens in order.

    Args:
        top_k_index: [T, K], expert numbers; num_experts or more means none.
        num_experts: of the layer.
    """

    def __init__(self, top_k_index: torch.Tensor, num_experts: int) -> None:
        self.num_tokens, self.top_k = top_k_index.shape
        flat = top_k_index.reshape(-1)
        if self.num_tokens == 1:
            chosen = flat.tolist()
            self._places: dict[int, list[int]] = {}
            for place, expert in enumerate(chosen):
                if expert < num_experts:
                    self._places.setdefault(expert, []).append(place)
        else:
            order = flat.argsort(stable=True).tolist()
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
