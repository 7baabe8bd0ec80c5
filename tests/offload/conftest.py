"""The file of experts that runtimes read."""

import pytest

from helpers.expert_runtimes import write_experts


@pytest.fixture(scope="session")
def experts_file(tmp_path_factory):
    return write_experts(tmp_path_factory.mktemp("runtime") / "experts.bin")
