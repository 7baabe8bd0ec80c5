"""A small checkpoint to compare with, the text, and the routes that it takes."""

import pytest
import torch

from moeflow.hf import experts_interface


@pytest.fixture(scope="session")
def rows():
    return torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="session")
def routes(mixtral, rows):
    """[layer] -> top_k_index [T, K], as transformers' own model routes the text."""
    found, hooks = [], []
    for _, module in experts_interface.experts_modules(mixtral):
        hooks.append(module.register_forward_hook(lambda module, args, output: found.append(args[1])))
    with torch.no_grad():
        mixtral(torch.tensor(rows))
    for hook in hooks:
        hook.remove()
    return found
