"""Quantises a model of the hub while it comes: the disk never holds both the checkpoint and what is written of it.

Knows the order of the steps. Knows nothing of formats or of how files come.
"""

import shutil
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

from moeflow.atomic_file import cannot_write
from moeflow.checkpoint.packed_writer import check_output
from moeflow.checkpoint.quantized_source import writable_format
from moeflow.convert.quantize import Written, check_method, quantize_folder
from moeflow.errors import ConfigError, ModelSourceError, MoeflowError
from moeflow.file_lock import exclusive
from moeflow.hf.model_folder import ModelFolder
from moeflow.hub.passing_shards import PassingShards
from moeflow.hub.patience import PATIENCE_S
from moeflow.hub.repository import Repository
from moeflow.progress import ProgressCallback


class DownloadedQuantized(NamedTuple):
    """What a download that quantises did.

    Args:
        written: the folder.
        commit: of the repository.
        fetched_bytes: that came over the network in this run, the headers not counted.
        seconds: that it took.
    """

    written: Written
    commit: str
    fetched_bytes: int
    seconds: float


def download_quantized(
    id: str,
    out: str | Path,
    format: str,
    *,
    method: str = "hqq",
    revision: str | None = None,
    token: str | bool | None = None,
    patience_s: float = PATIENCE_S,
    progress: ProgressCallback | None = None,
) -> DownloadedQuantized:
    """Write the folder that `quantize_model` writes of a model of the hub, byte for byte. Lossy.

    Each shard is fetched and checked, what it holds is written, and it is dropped when nothing needs it any more; the
    next one comes meanwhile where the disk has room for it. Beside `out` lie `OUT.partial` and `OUT.download` until it
    is done: a run that was ended goes on from them with the same arguments, and no shard that was dropped comes again.

    Args:
        id: on the hub: org/name.
        out: the folder to write; must not exist.
        format: of the experts: "int4", "int8" and so on.
        method: "hqq" (zeros optimised, no data) or "rtn" (round to nearest).
        revision: a branch, tag or commit; None for the default branch.
        token: see `Repository`.
        patience_s: how long nothing may come before it gives up.
        progress: called with (bytes of shards that came, bytes of all shards).

    Raises:
        ConfigError: `out` exists or another process writes it; an unknown format or method; the experts are quantised
            already.
        ModelSourceError: the repository cannot be had, has no safetensors or a packed file; the disk has no room for
            what is written and the shards that are there at one time, or cannot be written.
        UnsupportedModelError: a dense model, or experts in a form that is not read.
        CheckpointError: a shard is damaged, or weights that are no numbers.
    """
    begin_s = time.monotonic()
    out = Path(out)
    if format == "lossless":
        raise ConfigError(
            'format="lossless" needs a look at all experts before the first is written. Fetch the model, then pack it: '
            "moeflow download, moeflow pack."
        )
    name = writable_format(format).name
    check_method(method)
    check_output(out)
    work = out.with_name(f"{out.name}.download")

    def refuse() -> NoReturn:
        raise ConfigError(f"{out} is being written by another process. Wait for it, or give another folder.")

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(out.with_name(f"{out.name}.download.lock"), on_taken=refuse):
            repository = Repository(id, revision, token, patience_s=patience_s)
            is_new = not work.exists()
            with PassingShards(repository, work, progress) as shards:
                try:
                    checkpoint = shards.open()
                    folder = ModelFolder(checkpoint.folder, checkpoint=checkpoint)
                    written = quantize_folder(
                        folder, out, name, method=method, shards=shards, progress=lambda done, total: shards.tell()
                    )
                except MoeflowError:
                    if is_new and not shards.planned:
                        shutil.rmtree(work, ignore_errors=True)
                    raise
    except OSError as error:
        raise ModelSourceError(cannot_write(error.filename or out, error)) from error
    return DownloadedQuantized(written, repository.commit, shards.fetched_bytes, time.monotonic() - begin_s)
