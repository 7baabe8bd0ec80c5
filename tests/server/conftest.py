"""One server on a tiny model for all tests of a file."""

import pytest

from helpers.servers import serving, small_model


@pytest.fixture(scope="session")
def small():
    return small_model()


@pytest.fixture(scope="module")
def client(small):
    with serving(small) as client:
        yield client
