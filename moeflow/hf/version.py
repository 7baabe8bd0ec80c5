"""Check of the version of transformers: an import that fails names the version that moeflow needs."""

from collections.abc import Iterator
from contextlib import contextmanager

from moeflow.errors import UnsupportedModelError


@contextmanager
def parts_of_transformers() -> Iterator[None]:
    """Guard imports of names that not every version of transformers has.

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
