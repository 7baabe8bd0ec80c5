"""`moeflow download`: a model from the hub, and the same for the commands that are given an id."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moeflow.errors import ConfigError, ModelSourceError, MoeflowError
from moeflow.formatting import format_bytes, format_seconds
from moeflow.progress import ProgressCallback


def add_download_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `download` to the parser's commands."""
    download = commands.add_parser("download", help="fetch a model from the hub; a run that was ended goes on")
    download.add_argument("id", help="on the hub: org/name")
    download.add_argument("--to", metavar="FOLDER", help="folder for the files (the hub's cache, where load_moe looks)")
    download.add_argument("--gguf-file", metavar="NAME", help="of a repository with GGUF files, the one to fetch")
    download.add_argument("--revision", metavar="R", help="branch, tag or commit (the default branch)")
    download.add_argument(
        "--quantize",
        metavar="FORMAT",
        help="write the folder --to with its experts in int8, int4, int3, int2, int1 or int4-g128 and the like, as "
        "`moeflow quantize` does; each shard is packed and dropped, so that the disk needs room for what is written "
        "and for a few shards",
    )
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


def fetched(source: str | Path, *, gguf_file: str | None = None, config: str | None = None) -> Path:
    """Return the folder of a model; what is missing of a hub id is fetched, with its progress shown.

    Before a model's first fetch, what it takes here and how fast it would run is told on standard error.

    Args:
        source: a hub id, a folder or a GGUF file.
        gguf_file: name of the GGUF file to take, of a repository or folder with several.
        config: folder or hub id whose config and tokenizer win over a GGUF file's own.

    Raises:
        ModelSourceError: neither a folder nor an id that the hub or its cache has, or the user wants no model that
            does not fit.
    """
    from moeflow.hf.pretrained import resolve_folder

    if _is_not_here(str(source)):
        _tell_fit(str(source), gguf_file)
    with fetch_progress(str(source)) as progress:
        return resolve_folder(source, gguf_file=gguf_file, config=config, progress=progress)


def resolve_model(arguments: argparse.Namespace) -> None:
    """Put the folder in place of a command's model where flags say which of its files are meant.

    Args:
        arguments: of any command; those without the flags of `add_model_argument` stay as they are, and so do those
            of a command that reads headers alone and chooses among GGUF files itself.

    Raises:
        ConfigError: flags without a model, or --config beside a model that is no GGUF file.
        ModelSourceError: see `fetched`.
    """
    gguf_file, config = getattr(arguments, "gguf_file", None), getattr(arguments, "config", None)
    only_headers = getattr(arguments, "reads_headers", False) and config is None
    if "model" not in arguments or only_headers or (gguf_file is None and config is None):
        return
    if arguments.model is None:
        raise ConfigError("--gguf-file and --config are about a model: name it.")
    folder = fetched(arguments.model, gguf_file=gguf_file, config=config)
    if config is not None and not (folder / "gguf.json").is_file():
        raise ConfigError(
            f"--config is for GGUF files, and {arguments.model} is none: its config.json lies in its folder. Leave "
            "--config out."
        )
    arguments.model = str(folder)


def _is_not_here(id: str) -> bool:
    """Whether nothing of a hub id is in the cache, and the hub may be asked."""
    from huggingface_hub import constants

    from moeflow.hub.stores import CacheStore

    return not constants.HF_HUB_OFFLINE and not Path(id).exists() and CacheStore(id).cached(None) is None


def _tell_fit(id: str, gguf_file: str | None) -> None:
    """Tell what a model takes on this machine; ask on a terminal whether to fetch one that does not fit."""
    from moeflow.cli.fit import advice
    from moeflow.fit.fit import survey

    def tell(text: str) -> None:
        print(f"moeflow: {text}", file=sys.stderr)

    try:
        found = survey(id, gguf_file=gguf_file, tell=tell)
    except ModelSourceError:
        return  # fetching tells it
    except MoeflowError as error:
        tell(f"what {id} takes is not known before it is here: {error}")
        return
    tell(advice(found))
    if found.recommended is None and sys.stdin.isatty() and sys.stderr.isatty():
        print("Fetch it all the same? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise ModelSourceError(f"{id} was not fetched. moeflow download {id} fetches it without asking.")


def _download(arguments: argparse.Namespace) -> int:
    from moeflow.hub.download import fetch_model

    if arguments.quantize is not None:
        return _download_quantized(arguments)
    with fetch_progress(arguments.id) as progress:
        done = fetch_model(
            arguments.id,
            arguments.to,
            gguf_file=arguments.gguf_file,
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
    loaded = repr(str(done.folder) if arguments.to else arguments.id)
    if arguments.gguf_file is not None:
        loaded += f", gguf_file={arguments.gguf_file!r}"
    print(f"{done.folder}: {size}; {took}. load_moe({loaded})")
    return 0


def _download_quantized(arguments: argparse.Namespace) -> int:
    from moeflow.cli.quantize import figures_of, line_of
    from moeflow.convert.download_quantized import download_quantized

    if arguments.to is None:
        raise ConfigError("--quantize writes a folder: name it with --to.")
    if arguments.gguf_file is not None:
        raise ConfigError(
            "--quantize is for safetensors, and the weights of a GGUF file were rounded before. Leave --quantize out "
            "to fetch the file as it is, or leave --gguf-file out."
        )
    if arguments.force:
        raise ConfigError("--force fetches again what is there, and --quantize keeps nothing there. Leave one out.")
    with fetch_progress(arguments.id) as progress:
        done = download_quantized(
            arguments.id,
            arguments.to,
            arguments.quantize,
            revision=arguments.revision,
            patience_s=arguments.patience,
            progress=progress,
        )
    if arguments.json:
        about = {"id": arguments.id, "commit": done.commit, "fetched_bytes": done.fetched_bytes}
        print(json.dumps({**about, "seconds": done.seconds, **figures_of(done.written)}))
        return 0
    print(f"fetched {format_bytes(done.fetched_bytes)} in {format_seconds(done.seconds)}, commit {done.commit[:12]}")
    print(line_of(done.written))
    return 0
