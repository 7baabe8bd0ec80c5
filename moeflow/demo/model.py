"""Builds a small real mixture of experts on the user's machine: no hub, no training, a few minutes.

A dense SmolLM2-135M-Instruct comes out of a wheel on the package index, `split` turns its feed-forward layers
into experts, and a Mixtral checkpoint in the hub's layout appears under the final name only when complete.
Knows nothing of running the result.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeflow.atomic_file import sync_folder, write_atomically
from moeflow.calibration.sample_texts import calibration_prompts, library_texts, sample_continuations
from moeflow.demo.checkpoint import mixtral_config, read_layer, write_layer, write_shards
from moeflow.demo.recipe import Recipe
from moeflow.demo.source import (
    GGUF_BYTES,
    GGUF_SHA256,
    WHEEL,
    WHEEL_BYTES,
    fetch_gguf,
    load_dense_model,
)
from moeflow.demo.stages import Stages
from moeflow.errors import DemoModelError
from moeflow.file_lock import exclusive
from moeflow.paths import cache_folder

if TYPE_CHECKING:
    from transformers import GenerationConfig, MixtralConfig

    from moeflow.demo.stream import Stream

logger = logging.getLogger(__name__)

CHECKPOINT_BYTES = 1_385_000_000
NUM_SHARDS = 4
# Layer files, one shard being gathered from them, and wheel and GGUF side by side.
DISK_BYTES = CHECKPOINT_BYTES + CHECKPOINT_BYTES // NUM_SHARDS + WHEEL_BYTES + GGUF_BYTES + 100_000_000
# Of the time of a whole build on a CPU, the download apart.
_SHARES = {"sample": 0.32, "layers": 0.65, "write": 0.03}
FORMAT = 1  # raise it when a partial build of an older moeflow must not be continued


@dataclass(frozen=True)
class DemoModelCard:
    """Costs of building the demo model, to be shown before the first build.

    Args:
        source: the download, and its licence.
        download_bytes: size of the download.
        disk_bytes: free disk space the build needs at its peak.
        checkpoint_bytes: size of the finished checkpoint.
        memory_bytes: memory the build stays under.
        expected_minutes: build time on two cores, from free and fast ones to slow and busy ones.
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
    """Return the source of the demo model and the costs of building it."""
    return DemoModelCard(
        source=f"SmolLM2-135M-Instruct (Apache-2.0), from the package index: {WHEEL}",
        download_bytes=WHEEL_BYTES,
        disk_bytes=DISK_BYTES,
        checkpoint_bytes=CHECKPOINT_BYTES,
        memory_bytes=3_200_000_000,
        expected_minutes=(5, 16),
        path=default_demo_path(),
    )


def default_demo_path() -> Path:
    """Return the folder of the demo model, in moeflow's cache folder."""
    return cache_folder() / "demo-model"


def build_demo_model(out: Path | None = None, *, progress: bool = True, source: Path | None = None) -> Path:
    """Build the demo model, or continue a build that was interrupted, or return at once when it is there.

    Args:
        out: folder of the finished checkpoint; `default_demo_path()` when None.
        progress: show the stages on stderr.
        source: the wheel or the GGUF file, where it is already on this machine.

    Returns:
        The folder of the checkpoint.

    Raises:
        DemoModelError: the wheel cannot be fetched, a checksum differs, the disk is too small, or `out` is taken.
    """

    def load_dense(work: Path) -> tuple:
        return load_dense_model(fetch_gguf(work / "source", source))

    out = default_demo_path() if out is None else Path(out)
    return build_checkpoint(
        load_dense, out, Recipe(), GGUF_SHA256, disk_bytes=DISK_BYTES, stages=Stages(progress, _SHARES)
    )


def build_checkpoint(
    load_dense: Callable[[Path], tuple],
    out: Path,
    recipe: Recipe,
    source_id: str,
    disk_bytes: int,
    stages: Stages,
) -> Path:
    """Convert a dense Llama into a Mixtral checkpoint, continuing where an earlier run of the same inputs stopped.

    Everything unfinished lies in `out` + ".partial"; each piece there appears by rename, and so does `out`.

    Args:
        load_dense: gives (model, tokenizer) when called with the work folder.
        out: folder of the finished checkpoint.
        recipe: sizes and constants.
        source_id: names the dense weights; a partial build of other weights is discarded.
        disk_bytes: disk space that a build from scratch needs at its peak.
        stages: shows the progress.

    Raises:
        DemoModelError: the disk is too small or fills up, or `out` holds something else.
    """
    out = out.expanduser().absolute()
    inputs = {"format": FORMAT, "source": source_id, "recipe": asdict(recipe)}
    work, lock = out.with_name(out.name + ".partial"), out.with_name(out.name + ".lock")
    if _is_complete(out) and not work.exists() and not lock.exists():  # else a build was killed in its last steps
        return out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(
            lock,
            on_taken=lambda: logger.warning("another process builds %s; waiting for it", out),
        ):
            if not _is_complete(out):  # another process may have finished it while this one waited
                _open_work_folder(work, inputs)
                _check_disk(work, disk_bytes)
                _build(load_dense, work, recipe, stages)
                write_atomically(work / "checkpoint" / "demo_model.json", json.dumps(inputs, indent=2) + "\n", None)
                os.rename(work / "checkpoint", out)
                sync_folder(out.parent)
            if work.exists():
                shutil.rmtree(work)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            message = f"the disk filled up while building in {work}; free space and run it again: it continues there"
        else:
            message = f"cannot build the demo model in {work}: {error}; choose a folder that can be written"
        raise DemoModelError(message) from error
    finally:
        stages.close()
    return out


def _build(load_dense: Callable[[Path], tuple], work: Path, recipe: Recipe, stages: Stages) -> None:
    """Make every piece in the work folder that is missing."""
    import torch

    from moeflow.demo.stream import Stream

    stages.start("fetch")
    model, tokenizer = load_dense(work)
    _return_freed_memory()
    with torch.inference_mode():
        texts = _calibration_texts(model, tokenizer, work / "texts.json", recipe, stages)
        layer_files = [work / f"layer-{i:04d}.safetensors" for i in range(model.config.num_hidden_layers)]
        checkpoint = work / "checkpoint"
        if not checkpoint.is_dir():
            _split_layers(Stream(model, texts), layer_files, recipe, stages)
            checkpoint.mkdir()  # from here on, layer files may go away as shards take them over
        stages.start("write", NUM_SHARDS)
        config = mixtral_config(model.config, recipe)
        config.save_pretrained(checkpoint)
        _generation_config(config).save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        write_shards(checkpoint, layer_files, model, NUM_SHARDS, stages.advance)


def _calibration_texts(model: Any, tokenizer: Any, path: Path, recipe: Recipe, stages: Stages) -> list[list[int]]:
    if path.is_file():
        return json.loads(path.read_text())
    stages.start("sample", recipe.num_new_tokens)
    prompts = calibration_prompts(tokenizer, recipe.num_prompts, recipe.seed)
    texts = sample_continuations(
        model, prompts, recipe.num_new_tokens, tokenizer.eos_token_id, recipe.seed, stages.advance
    )
    _return_freed_memory()
    texts += library_texts(tokenizer, recipe.num_library_tokens)
    write_atomically(path, json.dumps(texts), None)
    return texts


def _return_freed_memory() -> None:
    """Give freed memory back to the system: glibc would keep the sampling cache, 1.8 GB, beside what comes next."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _split_layers(stream: "Stream", layer_files: list[Path], recipe: Recipe, stages: Stages) -> None:
    from moeflow.demo.split import replay_layer, split_layer

    stages.start("layers", len(layer_files))
    for layer, path in enumerate(layer_files):
        if path.is_file():
            replay_layer(stream, read_layer(path, layer, recipe.num_experts), recipe)
            stages.repeat()
        else:
            write_layer(path, layer, stream.model.layers[layer], split_layer(stream, recipe))
            stages.advance()


def _generation_config(config: "MixtralConfig") -> "GenerationConfig":
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def _is_complete(out: Path) -> bool:
    if (out / "demo_model.json").is_file():  # written last, and `out` appears by rename
        index = json.loads((out / "model.safetensors.index.json").read_text())
        missing = [name for name in set(index["weight_map"].values()) if not (out / name).is_file()]
        if not missing:
            return True
        raise DemoModelError(f"{out} lacks {', '.join(sorted(missing))}; delete the folder and build it again")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DemoModelError(f"{out} exists and is not a demo model; name another folder or move it away")
    return False


def _open_work_folder(work: Path, inputs: dict) -> None:
    """Keep a partial build of the same inputs, discard any other, and drop files that were being written."""
    stamp = work / "inputs.json"
    work.mkdir(exist_ok=True)
    others = [path for path in work.iterdir() if stamp.name not in path.name]
    if others and not stamp.is_file():
        raise DemoModelError(f"{work} holds something that no build wrote; move it away or name another folder")
    if others and json.loads(stamp.read_text()) != inputs:
        logger.warning("%s was made from other inputs; starting again", work)
        for path in others:  # the stamp goes last: it says whose the folder is
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_atomically(stamp, json.dumps(inputs), None)
    for pattern in (".*.partial", ".*.lock"):
        for left in work.rglob(pattern):
            left.unlink()


def _check_disk(work: Path, disk_bytes: int) -> None:
    present = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    free = shutil.disk_usage(work).free
    if free < disk_bytes - present:
        raise DemoModelError(
            f"{work.parent} has {free / 1e9:.1f} GB free, the build needs {(disk_bytes - present) / 1e9:.1f} GB more; "
            "free space or name a folder on another disk"
        )
