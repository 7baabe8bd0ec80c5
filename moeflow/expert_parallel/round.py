"""One round of expert parallelism: the ranks' requests, and the three exchanges that answer them.

Knows experts that can run rows, and the group. Knows nothing of plans, sessions or models;
`moeflow.expert_parallel.expert_parallel` has the protocol.
"""

import weakref
from typing import NamedTuple

import torch

from moeflow.errors import ParallelError
from moeflow.expert_parallel.ranks import RankGroup
from moeflow.expert_parallel.traffic import Traffic
from moeflow.moe.experts import OffloadedExperts

ASKS, DONE, FAILED = range(3)
"""The state of a rank at the beginning of a round."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MARK_BYTES = 16  # one alignment, so that the rows behind it stay aligned


class Request(NamedTuple):
    """One rank's request to the others in a round.

    Args:
        layer: whose experts.
        rows: [n, H], hidden states, in the order of rank, then expert.
        counts: [G, E], rows for each rank and expert.
        outputs_dtype: dtype of the returned outputs.
        call_tokens: tokens of the rank's call: bits depend on them, and not on the rows that reach an expert's rank.
    """

    layer: int
    rows: torch.Tensor
    counts: torch.Tensor
    outputs_dtype: torch.dtype
    call_tokens: int


class Header(NamedTuple):
    """One rank's message to another at the beginning of a round; a row of whole numbers on the wire.

    Args:
        state: ASKS, DONE or FAILED; the other fields count only for ASKS.
        layer: whose experts.
        num_features: H.
        dtype: of hidden states, a number in _DTYPES.
        outputs_dtype: likewise.
        call_tokens: as a request has it.
        counts: [E], rows for each of the receiver's experts.
    """

    state: int
    layer: int
    num_features: int
    dtype: int
    outputs_dtype: int
    call_tokens: int
    counts: list[int]

    @classmethod
    def of(cls, row: list[int]) -> "Header":
        """Return the header in a row that came over the wire."""
        state, layer, num_features, dtype, outputs_dtype, call_tokens, *counts = row
        return cls(state, layer, num_features, dtype, outputs_dtype, call_tokens, counts)

    @property
    def num_rows(self) -> int:
        return sum(self.counts)

    @property
    def row_bytes(self) -> int:
        """Bytes of a hidden state."""
        return self.num_features * _DTYPES[self.dtype].itemsize

    @property
    def output_bytes(self) -> int:
        """Bytes of an output."""
        return self.num_features * _DTYPES[self.outputs_dtype].itemsize


class Rounds:
    """Meets the other ranks, runs this rank's experts for all, and counts the bytes it sends.

    Args:
        experts: [L], the model's.
        num_experts: E, of each layer.
        ranks: the group.
    """

    def __init__(self, experts: list[OffloadedExperts], num_experts: int, ranks: RankGroup) -> None:
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self.sent = Traffic(len(experts), ranks.world_size)
        self.failure: str | None = None  # error sent to all ranks since it was last set to None
        self._experts = [weakref.ref(served) for served in experts]  # weak: the experts hold this object
        self._num_experts = num_experts
        self._ranks = ranks
        self._device = experts[0].runtime.device

    def meet(self, state: int, request: Request | None = None) -> torch.Tensor | None:
        """Meet the other ranks once.

        Args:
            state: ASKS with a request, else DONE.
            request: this rank's request.

        Returns:
            [n, H], the outputs of the request's rows, no rows without a request; None where all ranks are done.

        Raises:
            ParallelError: another rank failed or was lost.
            ExpertReadError: one of this rank's experts could not be read.
        """
        ranks = self._ranks
        ranks.in_step = False  # until the round has ended: an interrupt may break it off
        headers = self._exchange_headers(state, request)
        states = {header.state for header in headers}
        if FAILED in states:
            self._hear(None)
            raise ParallelError(self.failure)
        if states == {DONE}:
            ranks.in_step = True
            return None
        received = self._dispatch(request, headers)
        failure, answers = None, None
        try:
            answers = self._answer(headers, received)
        except BaseException as error:  # of any kind: the others wait for outputs
            failure = error
        outputs, all_well = self._combine(request, headers, answers)
        if not all_well:
            self._hear(failure)
            raise failure or ParallelError(self.failure)
        ranks.in_step = True
        return outputs

    def tell(self, error: BaseException) -> None:
        """Tell the others, in their next round, that this rank has failed between two rounds.

        Raises:
            ParallelError: the others were lost.
        """
        self._ranks.in_step = False
        self._exchange_headers(FAILED, None)
        self._hear(error)

    def _hear(self, error: BaseException | None) -> None:
        """Exchange error texts: this rank's error, or None where another failed."""
        told = self._ranks.texts("" if error is None else f"{type(error).__name__}: {error}")
        self._ranks.in_step = True
        rank, text = next((rank, text) for rank, text in enumerate(told) if text)
        self.failure = f"rank {rank} failed, so all stop. It said: {text}"

    def _exchange_headers(self, state, request) -> list[Header]:
        """Send this rank's request to each rank; return [G], their requests to this one."""
        rows = torch.zeros(self.world_size, 6 + self._num_experts, dtype=torch.int64)
        rows[:, 0] = state
        if request is not None:
            dtypes = (_DTYPES.index(request.rows.dtype), _DTYPES.index(request.outputs_dtype))
            rows[:, 1:6] = torch.tensor([request.layer, request.rows.shape[1], *dtypes, request.call_tokens])
            rows[:, 6:] = request.counts
        self.sent.rounds += 1
        self.sent.metadata_bytes[self.rank] += rows[0].nbytes
        return [Header.of(row) for row in self._ranks.rows(rows).tolist()]

    def _dispatch(self, request, headers) -> torch.Tensor:
        """Send hidden states to the ranks that hold their experts; return the received rows as bytes."""
        send_bytes = [0] * self.world_size
        sent = torch.empty(0, dtype=torch.uint8, device=self._device)
        if request is not None:
            counts = request.counts.sum(dim=1)
            sent = _as_bytes(request.rows)
            send_bytes = (counts * request.rows.shape[1] * request.rows.dtype.itemsize).tolist()
            self.sent.assignments[request.layer, self.rank] += counts.numpy()
            self.sent.dispatch_bytes[request.layer, self.rank] += send_bytes
        return self._ranks.exchange(sent, send_bytes, [header.num_rows * header.row_bytes for header in headers])

    def _answer(self, headers, received) -> list[torch.Tensor]:
        """Run this rank's experts on the received rows.

        Returns:
            [G], the outputs for each rank as bytes.
        """
        pieces = received.split([header.num_rows * header.row_bytes for header in headers])
        # Ranks by size, dtypes and path of their rows: usually one group.
        alike: dict[tuple[int, int, int, int, int], list[int]] = {}
        for rank, header in enumerate(headers):
            if header.num_rows:
                path = self._served(header.layer).compute(_DTYPES[header.dtype]).path(header.call_tokens)
                layer, num_features, dtype, outputs_dtype = header[1:5]
                alike.setdefault((layer, num_features, dtype, outputs_dtype, path), []).append(rank)
        answers = [received[:0]] * self.world_size
        for (layer, num_features, dtype, outputs_dtype, _), sources in alike.items():
            rows = torch.cat([pieces[rank] for rank in sources]).view(_DTYPES[dtype]).view(-1, num_features)
            experts = torch.cat(
                [
                    torch.arange(self._num_experts).repeat_interleave(torch.tensor(headers[rank].counts))
                    for rank in sources
                ]
            )
            outputs = self._served(layer).run_rows(rows, experts, headers[sources[0]].call_tokens)
            outputs = outputs.to(_DTYPES[outputs_dtype])
            for rank, part in zip(sources, outputs.split([headers[rank].num_rows for rank in sources]), strict=True):
                answers[rank] = _as_bytes(part)
        return answers

    def _served(self, layer: int) -> OffloadedExperts:
        served = self._experts[layer]()
        assert served is not None, "the model of these experts is gone"
        return served

    def _combine(self, request, headers, answers) -> tuple[torch.Tensor | None, bool]:
        """Send outputs back, each rank's behind a mark of success.

        Args:
            answers: [G], bytes; None where running them failed.

        Returns:
            The outputs of the request's rows, and whether all ranks succeeded.
        """
        send_bytes = [header.num_rows * header.output_bytes for header in headers]
        mark = torch.full((_MARK_BYTES,), answers is not None, dtype=torch.uint8, device=self._device)
        if answers is None:
            answers = [mark.new_zeros(num_bytes) for num_bytes in send_bytes]
        receive_bytes = [0] * self.world_size
        if request is not None:
            row_bytes = request.rows.shape[1] * request.outputs_dtype.itemsize
            receive_bytes = (request.counts.sum(dim=1) * row_bytes).tolist()
        for rank, header in enumerate(headers):
            self.sent.combine_bytes[header.layer, self.rank, rank] += send_bytes[rank]
        self.sent.metadata_bytes[self.rank] += _MARK_BYTES
        received = self._ranks.exchange(
            torch.cat([part for answer in answers for part in (mark, answer)]),
            [num_bytes + _MARK_BYTES for num_bytes in send_bytes],
            [num_bytes + _MARK_BYTES for num_bytes in receive_bytes],
        )
        pieces = received.split([num_bytes + _MARK_BYTES for num_bytes in receive_bytes])
        all_well = all(bool(piece[0]) for piece in pieces)
        if request is None:
            return received[:0], all_well
        outputs = torch.cat([piece[_MARK_BYTES:] for piece in pieces])
        return outputs.view(request.outputs_dtype).view(-1, request.rows.shape[1]), all_well


def _as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """Return [n, H] of any dtype as [n * H * itemsize] uint8."""
    return rows.contiguous().view(-1).view(torch.uint8)
