"""A model's GGUF file, so that llama.cpp is measured on the same weights: written once, found again by its name."""

import hashlib
from pathlib import Path

from moeflow.checkpoint.headers import open_checkpoint

FORMAT = 3  # raise it when files of an older writer must not be used again


def gguf_of(checkpoint: str | Path, work: str | Path, experts: str = "f16") -> Path:
    """Return the GGUF file of a checkpoint in `work`, written now unless it lies there from an earlier call.

    Args:
        checkpoint: folder of a checkpoint with a tokenizer.
        work: folder for GGUF files; each is named by a hash of its source and appears whole.
        experts: type of the experts' matrices; the others are f16.

    Raises:
        MoeflowError: see `write_gguf`.
        OSError: `work` cannot be made.
    """
    source = open_checkpoint(Path(checkpoint))
    target = Path(work) / f"{source.folder.resolve().name}-{_fingerprint(source.folder, source.files)}.{experts}.gguf"
    if not target.is_file():
        from moeflow.convert.gguf import write_gguf

        target.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(checkpoint, target, "f16", experts=experts)
    return target


def _fingerprint(folder: Path, files: list[Path]) -> str:
    """Hash the inputs of the file; of the shards, name, size and time stand for their content."""
    digest = hashlib.sha256(f"{FORMAT}".encode())
    for file in files:
        status = file.stat()
        digest.update(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    for name in ("config.json", "tokenizer.json"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:12]
