"""config.json: read, checked and made a config of transformers.

Knows the fields that decide how much is built. Knows nothing of weights.
"""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moeflow.dtypes import parse_dtype
from moeflow.errors import CheckpointError, ConfigError, UnsupportedModelError
from moeflow.hf.quantizer import quantization_scheme
from moeflow.hf.version import parts_of_transformers
from moeflow.hf.wall import one_line, wall

with parts_of_transformers():
    import transformers
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Many times what any published model has. Layers and experts are built one by one, and a config of a million would run
# for minutes before it is seen not to fit its weights.
_MOST = {"layer": 512, "layers": 512, "depth": 512, "experts": 16384, "labels": 100_000}
_MOST_ENTRIES = 10_000  # of a list: one a layer, one a dimension, one an end token
_DTYPES = ("dtype", "torch_dtype")


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read config.json and refuse what this version cannot run.

    Args:
        folder: of the checkpoint, or the file itself.
        trust_remote_code: whether Python that the folder brings may run.

    Raises:
        CheckpointError: no or a corrupt config.json.
        ConfigError: a field of it is wrong.
        UnsupportedModelError: an unknown architecture, one that needs the folder's own Python, or a checkpoint
            quantised by a method that is not read.
    """
    file = folder if folder.is_file() else folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json. Give a folder written by save_pretrained or the hub.")
    fields = read_object(file)
    check_counts(fields, str(file))
    model_type: Any = fields.get("model_type")
    own_code = isinstance(fields.get("auto_map"), dict) and "AutoConfig" in fields["auto_map"]
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING

    def read(fields: dict[str, Any]) -> PreTrainedConfig:
        config = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(fields), name_or_path=str(folder))
        quantization_scheme(config, str(folder))
        return config

    def tell(error: BaseException) -> ConfigError | UnsupportedModelError:
        if "trust_remote_code" in str(error):  # transformers has no error class for that
            return UnsupportedModelError(
                f"{folder} needs Python code that it brings itself, and moeflow runs none of it unless told to. Read "
                "the code; if you trust it, load the model in Python with load_moe(..., trust_remote_code=True)."
            )
        if not known and not own_code:
            return UnsupportedModelError(
                f"{file}: transformers {transformers.__version__} does not know the model_type {model_type!r:.80}. "
                "A newer transformers may (pip install -U transformers)."
            )
        field = _refused_field(fields, read) if known and not own_code else None
        at = "" if field is None else f"{field} is {fields[field]!r:.80}, which it cannot be: "
        return ConfigError(f"{file}: {at}{one_line(error)}. Correct the field, or download the file again.")

    with wall(tell):
        if _spell_dtypes(fields, file) and known and not own_code:
            return read(fields)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        quantization_scheme(config, str(folder))
    return config


def _refused_field(fields: dict[str, Any], read: Callable[[dict[str, Any]], Any]) -> str | None:
    """Return the field with which a config cannot be read and without which it can."""

    def reads(fields: dict[str, Any]) -> bool:
        try:
            read(fields)
        except Exception:  # whatever transformers raises for a field
            return False
        return True

    if reads(fields):
        return None
    return next((name for name in fields if reads({key: fields[key] for key in fields if key != name})), None)


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object as transformers reads its files.

    Args:
        file: UTF-8, without a byte-order mark.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    remedy = "Download it again."
    try:
        text = file.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise CheckpointError(f"{file} begins with a byte-order mark. Save it as UTF-8 without one.")
        found = json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8 text ({error.reason}). Save it as UTF-8, or download it.") from None
    except RecursionError:
        raise CheckpointError(f"{file} is nested too deep. {remedy}") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}). {remedy}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a {type(found).__name__} where a JSON object belongs. {remedy}")
    return found


def check_counts(fields: dict[str, Any], source: str) -> None:
    """Refuse counts of layers, experts and labels that no model has, and endless lists, before anything is built.

    Args:
        fields: of a config, with those of its parts.
        source: of the fields, for errors.

    Raises:
        ConfigError: a count is beyond all measure, or negative.
    """
    for name, value in fields.items():
        entries = _longest_list(value)
        if entries > _MOST_ENTRIES:
            raise ConfigError(f"{source}: {name} has {entries} entries; it may have {_MOST_ENTRIES}. Correct it.")
    for part in _parts(fields):
        for name, value in part.items():
            most = _MOST.get(name.rpartition("_")[2])
            if most is None:
                continue
            for count in value if isinstance(value, list) else [value]:
                if type(count) is int and (count > most or (count < 0 and name.startswith("num_"))):
                    raise ConfigError(f"{source}: {name} is {count!r:.40}; it may be 0 to {most}. Correct it.")


def _longest_list(value: Any) -> int:
    """Return the length of the longest list in a JSON value."""
    longest, waiting = 0, [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            longest = max(longest, len(value))
        if isinstance(value, (list, dict)) and len(value) <= _MOST_ENTRIES:
            waiting += value.values() if isinstance(value, dict) else value
    return longest


def _parts(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a config's fields and those of the configs in it, which may be nested."""
    waiting = [fields]
    while waiting:
        part = waiting.pop()
        yield part
        waiting += [value for name, value in part.items() if name.endswith("config") and isinstance(value, dict)]


def _spell_dtypes(fields: dict[str, Any], file: Path) -> bool:
    """Write other names of dtypes ("bf16") as torch does, in place; tell whether one was found.

    Raises:
        ConfigError: no name of a dtype.
    """
    found = False
    for part in _parts(fields):
        for name in _DTYPES:
            value = part.get(name)
            if value is None or isinstance(value, dict):
                continue
            spelled = str(parse_dtype(value, f"{file}: {name}", floats_only=False)).removeprefix("torch.")
            found |= spelled != value
            part[name] = spelled
    return found
