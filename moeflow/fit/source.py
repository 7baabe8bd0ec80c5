"""Where a model's headers come from: a folder, the hub's cache on this machine, or the hub itself.

Knows places. Knows nothing of sizes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moeflow.errors import ModelSourceError
from moeflow.fit.sizes import ModelSizes, sizes_of


@contextmanager
def model_source(model: str | Path, tell: Callable[[str], None]) -> Iterator[tuple[ModelSizes, Path]]:
    """Yield a model's sizes, and the folder whose disk it would be read from.

    Args:
        model: a folder or a hub id.
        tell: called before something that takes long.

    Raises:
        ModelSourceError: neither.
    """
    folder = Path(model)
    if folder.is_dir():
        yield sizes_of(folder), folder
        return
    raise ModelSourceError(f"{model} is not a folder. Give a folder with a checkpoint, or a hub id.")
