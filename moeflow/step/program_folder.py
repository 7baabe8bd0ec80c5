"""The user's folder of programs: where the program of a model lies, by all that it was captured from."""

import hashlib
import logging
import platform
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

import moeflow
from moeflow.c_library import sources_checksum
from moeflow.hf.experts_interface import experts_modules
from moeflow.hf.passes.step_digest import step_digest
from moeflow.kernels import cpu
from moeflow.kernels.cpu.library import instruction_set
from moeflow.paths import cache_folder
from moeflow.step.program_file import FORMAT, KeptProgram, read_program, write_program

_MOST_FILES = 256  # the oldest go first
_log = logging.getLogger(__name__)


class KeptFile:
    """Where the program of one model and one number of rows is kept between processes.

    Args:
        model: as it is now.
        num_rows: of the program.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int) -> None:
        about = f"{_environment()} {step_digest(model)} {num_rows}"
        self._key = hashlib.sha256(about.encode()).hexdigest()
        self._path = cache_folder() / "programs" / f"{self._key[:32]}.json"
        self._model = model

    def read(self) -> KeptProgram | None:
        """Return what an earlier process found; None where that must be found anew."""
        model = self._model
        weights = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        return read_program(self._path, self._key, weights, len(experts_modules(model)))

    def write(self, kept: KeptProgram) -> None:
        """Keep it for later processes, where the folder can be written."""
        try:
            write_program(self._path, self._key, kept)
            _forget_oldest(self._path.parent)
        except (OSError, TypeError) as error:
            _log.info("the step of %s is not kept on disk: %s", type(self._model).__name__, error)


@cache
def _environment() -> str:
    """Return the versions of what makes and runs programs; in a checkout also the sources."""
    package = Path(moeflow.__file__).parent
    sources = 0
    for file in sorted([*(package / "step").rglob("*.py"), *(package / "hf").rglob("*.py")]):
        sources = zlib.crc32(file.read_bytes(), sources)
    versions = platform.python_version(), torch.__version__, transformers.__version__, moeflow.__version__
    library = sources_checksum(Path(cpu.__file__).parent), instruction_set()
    return repr((FORMAT, versions, sources, library))


def _forget_oldest(folder: Path) -> None:
    """Remove what was written first where there are too many files."""
    files = list(folder.glob("*.json"))
    if len(files) > _MOST_FILES:
        written: list[tuple[float, Path]] = []
        for file in files:
            with suppress(OSError):  # another process has removed it
                written.append((file.stat().st_mtime, file))
        for _, file in sorted(written)[:-_MOST_FILES]:
            file.unlink(missing_ok=True)
