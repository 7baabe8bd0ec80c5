"""What is said where a GPU has too little memory for a model's dense weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moeflow.errors import BudgetError


@contextmanager
def dense_weights_on(device: torch.device) -> Iterator[None]:
    """Load dense weights onto a device.

    Raises:
        BudgetError: they do not fit; what was loaded of them is free again.
    """
    told = None
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = str(error).partition("\n")[0]
    if told is not None:  # behind the handler, where nothing holds the weights any more
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise BudgetError(
            f"{device} has too little memory for the dense weights of this model, of which none can be left out "
            f"({told}). Free memory on it, choose another GPU, or load with device='cpu'. `moeflow info MODEL` says "
            "what they take."
        )
