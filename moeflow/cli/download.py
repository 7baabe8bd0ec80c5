"""`moeflow download`: a model from the hub, and the same for the commands that are given an id."""

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moeflow.formatting import format_bytes, format_seconds
from moeflow.progress import ProgressCallback


def add_download_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `download` to the parser's commands."""
    download = commands.add_parser("download", help="fetch a model from the hub; a run that was ended goes on")
    download.add_argument("id", help="on the hub: org/name")
    download.add_argument("--to", metavar="FOLDER", help="folder for the files (the hub's cache, where load_moe looks)")
    download.add_argument("--revision", metavar="R", help="branch, tag or commit (the default branch)")
    download.add_argument("--force", action="store_true", help="fetch files again that are there")
    download.add_argument(
        "--patience",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="how long lost connections are tried again without a byte coming (300)",
    )
    download.add_argument("--json", action="store_true", help="print one JSON object")
    download.set_defaults(run=_download)


@contextmanager
def fetch_progress(id: str) -> Iterator[ProgressCallback]:
    """Show how much of a model is fetched, from when the first byte is asked for.

    Args:
        id: of the model.

    Yields:
        A function of (bytes done, bytes in all).
    """
    from moeflow.cli.progress import bytes_progress

    with ExitStack() as stack:
        shown: list[ProgressCallback] = []

        def show(done: int, total: int) -> None:
            if not shown:
                shown.append(stack.enter_context(bytes_progress(f"fetching {id}")))
            shown[0](done, total)

        yield show


def fetched(source: str | Path) -> Path:
    """Return the folder of a model; what is missing of a hub id is fetched, with its progress shown.

    Args:
        source: a hub id or a folder.

    Raises:
        ModelSourceError: neither a folder nor an id that the hub or its cache has.
    """
    from moeflow.hf.pretrained import resolve_folder

    with fetch_progress(str(source)) as progress:
        return resolve_folder(source, progress=progress)


def _download(arguments: argparse.Namespace) -> int:
    from moeflow.hub.download import fetch_model

    with fetch_progress(arguments.id) as progress:
        done = fetch_model(
            arguments.id,
            arguments.to,
            revision=arguments.revision,
            force_download=arguments.force,
            patience_s=arguments.patience,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps({"id": arguments.id, **done._asdict(), "folder": str(done.folder)}))
        return 0
    size = f"{done.num_files} files, {format_bytes(done.num_bytes)}, commit {done.commit[:12]}"
    if done.fetched_bytes:
        rate = f"{format_bytes(round(done.fetched_bytes / max(done.seconds, 1e-9)))}/s"
        took = f"fetched {format_bytes(done.fetched_bytes)} in {format_seconds(done.seconds)}, {rate}"
    else:
        took = "all of it was there"
    print(f"{done.folder}: {size}; {took}. load_moe({str(done.folder) if arguments.to else arguments.id!r})")
    return 0
