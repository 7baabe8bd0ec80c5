"""`moeflow doctor`: what this machine, and a model's files, have wrong, and what to do."""

import argparse
import json
import shutil
from pathlib import Path

from moeflow.checkpoint.gguf.file import GGUF_FILE
from moeflow.cli.progress import share_progress
from moeflow.errors import ConfigError, MoeflowError

_MOST_WIDTH = 120


def add_doctor_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `doctor` to the parser's commands."""
    doctor = commands.add_parser("doctor", help="what is wrong here and what to do; what this machine can do")
    doctor.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder, GGUF file, or hub id that was downloaded: its disk too"
    )
    doctor.add_argument("--deep", action="store_true", help="read all of the model, and let it write 16 tokens")
    doctor.add_argument("--measure", action="store_true", help="measure what this machine can do, and keep it")
    doctor.add_argument("--seconds", type=float, default=20, metavar="S", help="that --measure takes, about (20)")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from moeflow.doctor.check_machine import check_machine
    from moeflow.doctor.finding import BROKEN, Finding, as_json, works
    from moeflow.doctor.page import findings_text, profile_text

    if arguments.deep and arguments.model is None:
        raise ConfigError("--deep reads all of a model: name the model.")
    folder, missing = _folder(arguments.model)
    place = _place(folder)
    findings = check_machine(place)
    if missing is not None:
        findings.append(Finding("model", arguments.model, BROKEN, str(missing), "give its folder, or download it"))
    if arguments.deep and folder is not None:
        from transformers.utils import logging

        from moeflow.doctor.check_model import check_model

        logging.disable_progress_bar()  # of the trial's loading, beside our own
        with share_progress(f"reading {folder.name}") as progress:
            findings += check_model(folder, progress)
    profile = None
    if arguments.measure:
        from moeflow.machine.measure import measure_profile

        with share_progress("measuring") as progress:
            profile = measure_profile(place, seconds=arguments.seconds, progress=progress)
    if arguments.json:
        print(json.dumps({**as_json(findings), "profile": profile.to_dict() if profile is not None else None}))
    else:
        print(findings_text(findings, min(shutil.get_terminal_size().columns, _MOST_WIDTH)))
        if profile is not None:
            print(f"\n{profile_text(profile)}")
    return 0 if works(findings) else 1


def _folder(model: str | None) -> tuple[Path | None, MoeflowError | None]:
    """Return the folder of a model, and why there is none; nothing is downloaded."""
    if model is None:
        return None, None
    if Path(model).is_dir() and not any(Path(model).glob("*.gguf")):
        return Path(model), None
    from moeflow.hf.pretrained import resolve_folder

    try:
        return resolve_folder(model, local_files_only=True), None
    except MoeflowError as error:
        return None, error


def _place(folder: Path | None) -> Path | None:
    """Return the folder whose disk a model is read from."""
    if folder is None or not (folder / GGUF_FILE).is_file():
        return folder
    from moeflow.hf.gguf.folder import weights_folder

    return weights_folder(folder)
