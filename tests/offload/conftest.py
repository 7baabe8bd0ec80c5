"""The files of experts that runtimes read."""

import pytest

from helpers.expert_runtimes import ODD_PAGES, PAGES, SHORT, write_experts


@pytest.fixture(scope="session")
def experts_file(tmp_path_factory):
    return write_experts(tmp_path_factory.mktemp("runtime") / "experts.bin")


@pytest.fixture(scope="session")
def experts_files(tmp_path_factory):
    """Files of every layout: each with its values and the layout."""
    folder = tmp_path_factory.mktemp("layouts")
    layouts = (SHORT, PAGES, ODD_PAGES)
    return [(*write_experts(folder / f"{number}.bin", layout), layout) for number, layout in enumerate(layouts)]
