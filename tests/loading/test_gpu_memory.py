"""A GPU that is too small for the dense weights: said by name, and nothing of the weights is held."""

import weakref

import pytest
import torch

from moeflow.errors import BudgetError
from moeflow.loading.gpu_memory import dense_weights_on


def test_too_little_memory_is_said_with_torchs_own_numbers_and_frees_what_was_loaded():
    held = []

    def load():
        weights = torch.zeros(10)
        held.append(weakref.ref(weights))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines")

    said = r"cuda:1 has too little.*Tried to allocate 20.00 GiB\.\).*device='cpu'"
    with pytest.raises(BudgetError, match=said), dense_weights_on(torch.device("cuda", 1)):
        load()
    assert held[0]() is None


def test_other_errors_are_as_they_are():
    with pytest.raises(RuntimeError, match="no such file"), dense_weights_on(torch.device("cuda", 0)):
        raise RuntimeError("no such file")
