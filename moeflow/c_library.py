"""C libraries built when moeflow was installed: found beside the module that calls them, loaded by ctypes.

A library that could not be built is absent, and its callers run without it. Knows files and names. Knows nothing of a
library's arithmetic.
"""

import ctypes
import logging
import zlib
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from moeflow.errors import ConfigError

_log = logging.getLogger(__name__)


def built_library(name: str, beside: str) -> str:
    """Return the path of a library in a module's folder.

    Args:
        name: of the library, "_replay".
        beside: the `__file__` of a module in the same folder.

    Raises:
        FileNotFoundError: it was not built, or of other sources than those that lie beside it.
        OSError: it is no library.
    """
    for suffix in reversed(EXTENSION_SUFFIXES):  # the plain ".so" that an installation builds comes first
        path = Path(beside).with_name(name + suffix)
        if path.is_file():
            sources = sources_checksum(path.parent)
            if sources and _checksum_of(path) != sources:  # its functions may take other arguments, and crash
                raise FileNotFoundError(f"{path} was built of other sources than those beside it")
            return str(path)
    raise FileNotFoundError(f"{name} was not built beside {beside}")


def sources_checksum(folder: Path) -> int:
    """Return the CRC-32 of the C and C++ files in a folder, by name; 0 where there are none, as in an installation."""
    checksum = 0
    for file in sorted(folder.iterdir()):
        if file.suffix in (".c", ".cpp", ".h"):
            checksum = zlib.crc32(file.read_bytes(), zlib.crc32(file.name.encode(), checksum))
    return checksum


def _checksum_of(path: Path) -> int:
    """Return the checksum of the sources that a library was built of; 0 where it does not say."""
    try:
        told = ctypes.CDLL(str(path)).moeflow_sources
    except AttributeError:
        return 0
    told.restype = ctypes.c_uint32
    return told()


def array_pointer(array: Any, kind: Any, shape: tuple[int, ...]) -> Any:
    """Return where an array lies, for C code that reads `shape` numbers there.

    Args:
        array: of numpy.
        kind: ctype of a number.
        shape: the array's, as the code takes it to be.

    Raises:
        ConfigError: the array has another shape or dtype, or does not lie in order.
    """
    if array.shape != shape or array.dtype != kind or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else ", not contiguous"
        raise ConfigError(
            f"an array is {array.dtype} {list(array.shape)}{order}, and "
            f"the compiled loop reads {kind.__name__} {list(shape)}. Give arrays of one problem, as they were made."
        )
    return array.ctypes.data_as(ctypes.POINTER(kind))


@cache
def c_function(
    name: str, beside: str, argtypes: tuple[type, ...], restype: type, *, without: str
) -> Callable[..., Any] | None:
    """Return the function `moeflow_<name>` of the library `_<name>`; None, said once, where that cannot be used.

    Args:
        name: of both, "replay".
        beside: the `__file__` of a module in the library's folder.
        argtypes: ctypes of its arguments.
        restype: ctype of what it returns.
        without: consequence of its absence, for the warning.
    """
    try:
        function = getattr(ctypes.CDLL(built_library(f"_{name}", beside)), f"moeflow_{name}")
    except (OSError, AttributeError) as error:
        _log.warning(
            "moeflow's compiled %s cannot be used (%s): %s. Install moeflow again where there is a C compiler.",
            name, error, without,
        )  # fmt: skip
        return None
    function.argtypes, function.restype = argtypes, restype
    return function
