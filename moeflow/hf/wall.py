"""The wall around calls into transformers with files and options of the user's: what they raise, told as our errors.

Knows exceptions and texts. Knows nothing of what is called.
"""

import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch

from moeflow.errors import MoeflowError

_LETTERS = 300  # of a foreign message that are told


@contextmanager
def wall(tell: Callable[[BaseException], MoeflowError], *, ours: Collection[BaseException] = ()) -> Iterator[None]:
    """Tell what a call into another library raises as an error of moeflow's, with the original as its cause.

    Passed on as they are: errors of moeflow's, interrupts, and a GPU that is out of memory.

    Args:
        tell: makes the error from the original; see `one_line`.
        ours: what code of moeflow's raised inside the call, passed on as it is. It may be filled while the call runs.

    Raises:
        MoeflowError: what `tell` made, with the original as its cause.
    """
    try:
        yield
    except BaseException as error:
        # A panic of a library in Rust is no Exception.
        foreign = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not foreign or isinstance(error, (MoeflowError, torch.OutOfMemoryError)) or error in ours:
            raise
        raise tell(error) from error


def raised_in(error: BaseException, package: str) -> bool:
    """Tell whether the innermost Python frame of an exception's traceback is of a package's code."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "") if frames else ""
    return module == package or module.startswith(f"{package}.")


def one_line(error: BaseException) -> str:
    """Describe an exception in one line of bounded length.

    Where the exception only wraps a field's own error (as checks of configs do), that one is described.
    """
    if type(error).__name__ == "StrictDataclassFieldValidationError" and error.__cause__ is not None:
        return _short(str(error.__cause__))
    return _short(f"{type(error).__name__}: {error}")


def _short(text: str) -> str:
    text = " ".join(text[: 20 * _LETTERS].split())
    return text if len(text) <= _LETTERS else text[:_LETTERS] + " ..."
