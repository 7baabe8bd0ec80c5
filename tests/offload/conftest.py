"""The file of experts that runtimes read."""

import numpy as np
import pytest
import torch

from helpers.expert_runtimes import NUM_EXPERTS, NUM_LAYERS, SIZE


@pytest.fixture(scope="session")
def experts_file(tmp_path_factory):
    """[NUM_LAYERS, NUM_EXPERTS, SIZE] float32, and the file they lie in at an odd offset."""
    values = np.random.default_rng(0).normal(size=(NUM_LAYERS, NUM_EXPERTS, SIZE)).astype(np.float32)
    path = tmp_path_factory.mktemp("runtime") / "experts.bin"
    path.write_bytes(b"odd" + values.tobytes())
    return path, torch.from_numpy(values)
