"""The ranks of one process group and their exchanges: fixed rows, bytes, and error texts.

The only file that calls torch.distributed's collectives. NCCL takes tensors on the GPU, gloo on the CPU; every exchange
is made of bytes, so that no dtype matters. With NCCL it is not yet measured on hardware.
"""

import os

import torch
import torch.distributed as dist

from moeflow.errors import ConfigError, ParallelError

_TEXT_BYTES = 1024


class RankGroup:
    """The collectives of expert parallelism.

    Args:
        group: a torch.distributed group; None for all processes.
        device: the model's.

    Raises:
        ConfigError: torch.distributed was not started, or its backend does not serve the device.
    """

    def __init__(self, group: "dist.ProcessGroup | None", device: torch.device) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError(
                "expert parallelism runs over torch.distributed, which was not started. Start the ranks with torchrun "
                'and call torch.distributed.init_process_group("gloo") ("nccl" on GPUs) first.'
            )
        backends, wanted = dist.get_backend_config(group), "cpu:gloo" if device.type == "cpu" else "cuda:nccl"
        if wanted not in backends.split(","):
            raise ConfigError(
                f"the process group's backends are {backends}, and the model on {device} needs {wanted}. Name it to "
                "torch.distributed.init_process_group."
            )
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._process_id = os.getpid()
        self.in_step = True  # whether all ranks are known to expect the same collective next
        self._group = group
        self._device = device

    def check(self) -> None:
        """Refuse a new exchange where ranks may wait for different collectives.

        Raises:
            ParallelError: an exchange was broken off before, or this process is a fork of the rank's.
        """
        if os.getpid() != self._process_id:
            raise ParallelError(
                f"this process was forked from rank {self.rank}, whose connections did not come along. Start ranks "
                "with torchrun or spawn, and run the model there."
            )
        if not self.in_step:
            raise ParallelError(
                "an exchange between the ranks was broken off, so they no longer wait for the same one. End all "
                "processes and start them again."
            )

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Send each rank one row and receive one from each.

        Args:
            rows: [G, N] int64 on the CPU, the row for each rank; N is the same on all.

        Returns:
            [G, N], the row from each rank, on the CPU.
        """
        rows = rows.to(self._device)
        received = torch.empty_like(rows)
        self._call(dist.all_to_all_single, received, rows)
        return received.cpu()

    def exchange(self, sent: torch.Tensor, send_bytes: list[int], receive_bytes: list[int]) -> torch.Tensor:
        """Send each rank some bytes and receive some from each.

        Args:
            sent: [sum(send_bytes)] uint8 on the model's device, those for rank 0 first.
            send_bytes: [G].
            receive_bytes: [G], as the others send.

        Returns:
            [sum(receive_bytes)] uint8, those from rank 0 first.
        """
        received = torch.empty(sum(receive_bytes), dtype=torch.uint8, device=self._device)
        self._call(dist.all_to_all_single, received, sent, receive_bytes, send_bytes)
        return received

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return [G, ...], the values of every rank, equal in shape and on the CPU."""
        values = values.to(self._device)
        gathered = [torch.empty_like(values) for _ in range(self.world_size)]
        self._call(dist.all_gather, gathered, values)
        return torch.stack(gathered).cpu()

    def texts(self, text: str) -> list[str]:
        """Return [G], the text of every rank, cut to 1024 bytes."""
        encoded = bytearray(text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0"))
        said = self.gather(torch.frombuffer(encoded, dtype=torch.uint8))
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in said]

    def _call(self, collective, *args) -> None:
        try:
            collective(*args, group=self._group)
        except RuntimeError as error:  # of the connection: a lost process, or the group's timeout
            self.in_step = False
            raise ParallelError(
                f"rank {self.rank} lost the others in the middle of an exchange ({str(error).partition('. ')[0]}). A "
                "process ended, or did not answer within the process group's timeout: see what the other ranks wrote."
            ) from error
