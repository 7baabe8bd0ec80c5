"""The device of a benchmark: its option, and the wait for what it still computes."""

import argparse
from typing import Any


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device` to a benchmark's options; the CPU where it is not given."""
    parser.add_argument("--device", default="cpu", metavar="D", help='"cpu", "cuda" or "cuda:N" (cpu)')


def synchronize(device: Any) -> None:
    """Wait until a device has computed all that was queued, as a clock must."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
