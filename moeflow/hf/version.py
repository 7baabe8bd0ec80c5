"""The version of transformers that moeflow needs, said where a part of it is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

from moeflow.errors import UnsupportedModelError


@contextmanager
def parts_of_transformers() -> Iterator[None]:
    """Stand around imports of transformers' names that are not everywhere.

    Raises:
        UnsupportedModelError: the installed transformers lacks one.
    """
    try:
        yield
    except ImportError as error:  # pragma: no cover - depends on the installed version
        raise UnsupportedModelError(
            f"moeflow needs transformers 5.17 or newer; this installation lacks a part it uses ({error}). "
            "Run: pip install -U 'transformers>=5.17'"
        ) from error
