"""A GGUF file as a model folder: small files in the cache that tell transformers what the file's metadata tells.

config.json, generation_config.json, tokenizer.json with its companions, and gguf.json, which names the file. Weights
stay where they are. All of moeflow opens the folder as any other.

Knows files and metadata. Knows nothing of weights or blocks.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from moeflow import __version__
from moeflow.atomic_file import sync_file, sync_folder, write_atomically
from moeflow.checkpoint.gguf.file import GGUF_FILE, GgufFile, open_gguf
from moeflow.errors import CheckpointError, ConfigError, UnsupportedModelError
from moeflow.file_lock import exclusive
from moeflow.hf.files.config import read_object
from moeflow.hf.gguf.architectures import find_architecture
from moeflow.hf.gguf.tokenizer import build_tokenizer
from moeflow.hf.gguf.values import readers
from moeflow.hf.gguf.vocabulary import end_ids, field, read_vocabulary
from moeflow.hf.wall import one_line, wall
from moeflow.paths import cache_folder

_LAYOUT = 1  # raise it when folders of an older moeflow must not be used again
_TOKENIZER = "tokenizer.json"
_TEMPLATE = "chat_template.jinja"
_TEMPLATES = "additional_chat_templates"
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAMPLING = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip


def gguf_folder(file: Path, *, config: Path | None = None) -> Path:
    """Return a model folder for transformers of a GGUF file, made now unless it lies in the cache from an earlier call.

    Files of the model's own win over what the metadata tells: config.json, generation_config.json, chat_template.jinja,
    and tokenizer.json with its companions, each from `config` where it has it, else from beside the GGUF file. What
    they lack the metadata tells: the special tokens where there is no tokenizer_config.json, the chat template where
    there is none. What a config.json says of quantised weights is left out: it is of other files.

    Args:
        file: the GGUF file; of a model in several, any of them.
        config: a folder with a config.json or a tokenizer.json or both, such as the model's own.

    Returns:
        A folder in `cache_folder() / "gguf"`, named after the file. It holds no weights, only gguf.json with the
        absolute paths and sizes of all of the model's GGUF files. It may be deleted: the next call makes it again.

    Raises:
        CheckpointError: the file is no GGUF file, is damaged, or its metadata is wrong or lacks a key.
        UnsupportedModelError: a dense model, or an architecture or tokenizer that is not known.
        ConfigError: `config` has neither file, or the cache folder cannot be written.
    """
    found = open_gguf(file)
    name = field(found.metadata, "general.architecture", str)
    if not found.metadata.get(f"{name}.expert_count"):
        raise UnsupportedModelError(
            f"{file} is a dense model ({name}, without {name}.expert_count), and moeflow runs mixtures of experts. Run "
            "it with llama.cpp, or with transformers: from_pretrained(folder, gguf_file=...)."
        )
    given = _given_files(found.files[0].parent, config)
    folder = cache_folder() / "gguf" / f"{found.files[0].stem[:80]}-{_key(found, given)}"
    if (folder / GGUF_FILE).is_file():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder.with_name(f".{folder.name}.lock")):
            if not (folder / GGUF_FILE).is_file():  # another process may have made it while this one waited
                for left in (partial, folder):
                    shutil.rmtree(left, ignore_errors=True)
                try:
                    partial.mkdir()
                    _fill(partial, file, found, given)
                    for made in partial.rglob("*.*"):
                        sync_file(made)
                    os.rename(partial, folder)
                    sync_folder(folder.parent)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ConfigError(_cannot_write(folder, error.strerror or str(error))) from error
    return folder


def open_gguf_of(folder: Path) -> GgufFile | None:
    """Return the GGUF file that a folder of `gguf_folder` stands for; None for any other folder.

    Raises:
        CheckpointError: the file is gone, is damaged, or has another size than when the folder was made.
    """
    path = folder / GGUF_FILE
    if not path.is_file():
        return None
    told = read_object(path)
    try:
        files, sizes = [folder / file for file in told["files"]], list(told["sizes"])  # relative where it was packed
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: delete {folder}, and give the GGUF file again.") from error
    found = open_gguf(files[0])
    if found.files != files or [stamp.num_bytes for stamp in found.stamps] != sizes:
        raise CheckpointError(f"{files[0]} is another file than {folder} was made for. Give the GGUF file itself.")
    return found


def weights_folder(folder: Path) -> Path:
    """Return the folder that a model's weights lie in: that of its GGUF file, where the folder only stands for one."""
    path = folder / GGUF_FILE
    files = read_object(path).get("files") if path.is_file() else None
    return (folder / str(files[0])).parent if isinstance(files, list) and files else folder


class _Own(NamedTuple):
    """A file of the model's own."""

    path: Path
    content: bytes


def _cannot_write(folder: Path, reason: str) -> str:
    return (
        f"{folder} cannot be written: {reason}. moeflow keeps a GGUF file's config and tokenizer there. Make room, or "
        "name a folder of yours in MOEFLOW_CACHE."
    )


def _given_files(beside: Path, config: Path | None) -> dict[str, _Own]:
    """Return the model's own files by their names in a model folder."""
    places = [beside]
    if config is not None:
        if not any((config / name).is_file() for name in ("config.json", _TOKENIZER)):
            raise ConfigError(f"{config} has neither config.json nor {_TOKENIZER}. Give the folder of the model's own.")
        places.insert(0, config)
    found = {}
    for name in ("config.json", "generation_config.json", _TOKENIZER, _TEMPLATE):
        place = next((place for place in places if (place / name).is_file()), None)
        if place is not None:
            found[name] = place / name
    if _TOKENIZER in found:
        place = found[_TOKENIZER].parent
        names = [*_COMPANIONS, *(f"{_TEMPLATES}/{path.name}" for path in (place / _TEMPLATES).glob("*.jinja"))]
        found.update({name: place / name for name in names if (place / name).is_file()})
    return {name: _Own(path, _read(path)) for name, path in found.items()}


def _read(path: Path, num_bytes: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(num_bytes)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _key(found: GgufFile, given: Mapping[str, _Own]) -> str:
    """Hash all that the folder is made of: the file's headers and places, files of the model's own, and versions."""
    digest = hashlib.sha256(f"{_LAYOUT} {__version__} {transformers.__version__}".encode())
    for number, (path, stamp) in enumerate(zip(found.files, found.stamps, strict=True)):
        begins = [entry.begin for entry in found.tensors.values() if entry.file == number]
        digest.update(f"\n{path.absolute()} {stamp.num_bytes}\n".encode())
        digest.update(_read(path, min(begins, default=stamp.num_bytes)))
    for name, own in sorted(given.items()):
        digest.update(f"\n{name} {len(own.content)}\n".encode() + own.content)
    return digest.hexdigest()[:16]


def _fill(folder: Path, file: Path, found: GgufFile, given: Mapping[str, _Own]) -> None:
    """Write all files of the folder."""
    _write(folder / "config.json", _config(file, found, given.get("config.json")))
    if "generation_config.json" in given:
        write_atomically(folder / "generation_config.json", given["generation_config.json"].content, None)
    else:
        _write(folder / "generation_config.json", _generation(found.metadata))
    _write_tokenizer(folder, found.metadata, given)
    files = [str(path.absolute()) for path in found.files]
    sizes = [stamp.num_bytes for stamp in found.stamps]
    _write(folder / GGUF_FILE, {"version": _LAYOUT, "files": files, "sizes": sizes})


def _write(path: Path, fields: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(fields, indent=2) + "\n", None)


def _config(file: Path, found: GgufFile, given: _Own | None) -> dict[str, Any]:
    architecture = find_architecture(found.metadata["general.architecture"])  # its tensors must be known in any case
    if given is not None:
        return _without_quantization(read_object(given.path))
    try:
        fields = architecture.config(found.metadata, readers(found))
    except KeyError as error:
        raise CheckpointError(
            f"{file}: the metadata of an architecture {architecture.name} must have {error.args[0]}, and it is not "
            "there. Download the file again, or give the folder of the model's own config.json (--config)."
        ) from error
    return {**fields, "dtype": _dtype(found)}


def _without_quantization(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a config without what it says of quantised weights, in its parts too."""
    return {
        name: _without_quantization(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if name not in ("quantization_config", "compression_config")
    }


def _dtype(found: GgufFile) -> str:
    """Return the dtype to compute in: that of most of the weights' bytes where all are floats, else bfloat16."""
    num_bytes: dict[str, int] = {}
    for entry in found.tensors.values():
        num_bytes[entry.dtype] = num_bytes.get(entry.dtype, 0) + entry.num_bytes
    if not num_bytes or num_bytes.keys() - _DTYPES.keys():
        return "bfloat16"
    return _DTYPES[max(num_bytes, key=lambda name: num_bytes[name])]


def _write_tokenizer(folder: Path, metadata: Mapping[str, Any], given: Mapping[str, _Own]) -> None:
    """Write the tokenizer that the metadata tells, and the model's own files over it."""
    own = {name: file for name, file in given.items() if name not in ("config.json", "generation_config.json")}
    tokenizer = build_tokenizer(metadata, own[_TOKENIZER].path if _TOKENIZER in own else None)
    fields = read_object(own["tokenizer_config.json"].path) if "tokenizer_config.json" in own else {}
    if fields.get("chat_template") or any("chat_template" in name for name in own):
        tokenizer.chat_template = None

    def tell(error: BaseException) -> ConfigError:
        return ConfigError(_cannot_write(folder, one_line(error)))

    with wall(tell):  # the library tokenizers tells of a full disk in errors of its own
        tokenizer.save_pretrained(folder)
    for name, file in own.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomically(folder / name, file.content, None)


def _generation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the metadata tells of generating: where it begins and ends, and how tokens are drawn."""
    vocabulary = read_vocabulary(metadata)
    names = {"bos_token_id": "bos", "pad_token_id": "padding"}
    fields: dict[str, Any] = {
        option: vocabulary.special[name] for option, name in names.items() if name in vocabulary.special
    }
    ends = end_ids(vocabulary)
    if ends:
        fields["eos_token_id"] = ends
    drawn = {
        option: _number(metadata, f"general.sampling.{name}")
        for name, option in _SAMPLING.items()
        if f"general.sampling.{name}" in metadata
    }
    if drawn.get("temperature", 1) <= 0:
        return {**fields, "do_sample": False}
    return {**fields, "do_sample": True, **drawn} if drawn else fields


def _number(metadata: Mapping[str, Any], key: str) -> float:
    value = metadata[key]
    if type(value) not in (int, float):
        raise CheckpointError(f"{key} is {value!r:.80}, which is no number. Download the file again.")
    return value if isinstance(value, int) else float(f"{value:.6g}")  # stored in 32 bits: 0.6 is 0.60000002
