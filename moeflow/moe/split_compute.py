"""Runs a layer's experts in two places: those in device slots on the device, others on the CPU where they lie.

Knows two computes and the way of tokens and outputs between them. Knows nothing of who chose the place. Its arithmetic
is tested without a GPU; its overlap is not yet measured on one.
"""

import torch

from moeflow.moe.compute import ExpertCompute, run_apart
from moeflow.moe.dispatch import Dispatch
from moeflow.offload.slot_pool import Resident
from moeflow.offload.trusting.downloads import Download, Downloads


class TokensOnHost:
    """The tokens of one layer on their way to host memory.

    Args:
        hidden_states: [T, H], on the device.
        downloads: the ways down.
    """

    def __init__(self, hidden_states: torch.Tensor, downloads: Downloads) -> None:
        self.hidden_states = hidden_states
        self._downloads = downloads
        self._sent: Download | None = None

    def send(self) -> None:
        """Start their copy, behind what is queued so far and before what the device is given from now on."""
        self._sent = self._downloads.start(self.hidden_states)

    def wait(self) -> torch.Tensor:
        """Wait for them, sent or not; return [T, H] in host memory, valid while this object is held."""
        if self._sent is None:
            self.send()
        assert self._sent is not None, "tokens that were never sent"
        rows = torch.from_numpy(self._sent.wait())
        return rows.view(self.hidden_states.dtype).view(self.hidden_states.shape)


class SplitCompute:
    """The device's kernels and the CPU's behind one layer.

    Args:
        device: computes experts in the device's slots.
        host: computes experts in host memory, on tokens there.
        downloads: the ways of tokens there.
    """

    def __init__(self, device: ExpertCompute, host: ExpertCompute, downloads: Downloads) -> None:
        self.device = device
        self._host = host
        self._downloads = downloads
        self._tokens: TokensOnHost | None = None  # of the call under way

    def tokens_on_host(self, hidden_states: torch.Tensor) -> TokensOnHost:
        """Return the way of a call's tokens to host memory, which `run` takes where it has an expert there."""
        self._tokens = TokensOnHost(hidden_states, self._downloads)
        return self._tokens

    def path(self, call_tokens: int) -> int:
        return self.device.path(call_tokens)

    def allocate_outputs(self, hidden_states: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        return self.device.allocate_outputs(hidden_states, dispatch)

    def run(
        self, hidden_states: torch.Tensor, residents: list[Resident], dispatch: Dispatch, outputs: torch.Tensor
    ) -> None:
        on_device = [resident for resident in residents if not resident.on_host]
        if on_device:
            self.device.run(hidden_states, on_device, dispatch, outputs)
        on_host = [resident for resident in residents if resident.on_host]
        if on_host:
            self._run_on_host(hidden_states, on_host, dispatch, outputs)

    def run_token(
        self, hidden_states: torch.Tensor, residents: list[Resident], dispatch: Dispatch, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if any(resident.on_host for resident in residents):
            return run_apart(self, hidden_states, residents, dispatch, top_k_weights)
        return self.device.run_token(hidden_states, residents, dispatch, top_k_weights)

    def combine(self, hidden_states: torch.Tensor, outputs: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        self._tokens = None
        return self.device.combine(hidden_states, outputs, top_k_weights)

    def _run_on_host(
        self, hidden_states: torch.Tensor, residents: list[Resident], dispatch: Dispatch, outputs: torch.Tensor
    ) -> None:
        tokens = self._tokens
        if tokens is None or tokens.hidden_states is not hidden_states:
            tokens = self.tokens_on_host(hidden_states)
        rows = tokens.wait()
        computed = self._host.allocate_outputs(rows, dispatch)
        self._host.run(rows, residents, dispatch, computed)
        places = torch.tensor([place for resident in residents for place in dispatch.places(resident.expert)])
        found = computed[places].to(outputs.dtype)
        outputs[places.to(outputs.device, non_blocking=True)] = found.to(outputs.device, non_blocking=True)
