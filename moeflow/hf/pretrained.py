"""Loads from a folder through transformers: tokenizer, the empty model, the model without its experts.

Knows folders, configs and from_pretrained. Knows nothing of where an expert's bytes lie: see `model_folder`.
"""

import copy
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from moeflow.checkpoint.headers import Checkpoint
from moeflow.checkpoint.prequantized.scheme import StoredMatrix, find_matrices
from moeflow.dtypes import parse_dtype
from moeflow.errors import CheckpointError, ConfigError, ModelSourceError, MoeflowError, UnsupportedModelError
from moeflow.hf.experts_interface import IMPLEMENTATION, conversions
from moeflow.hf.files.config import read_object
from moeflow.hf.files.generation import check_generation_file
from moeflow.hf.gguf.dense_weights import DenseWeights
from moeflow.hf.gguf.resolve import gguf_folder_of, is_gguf
from moeflow.hf.quantizer import WithoutExperts, check_quantised, quantization_scheme, take_experts_off
from moeflow.hf.version import parts_of_transformers
from moeflow.hf.wall import one_line, wall
from moeflow.hub.download import fetch_model
from moeflow.progress import ProgressCallback

with parts_of_transformers():
    import transformers
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )
    from transformers.core_model_loading import rename_source_key

Found = TypeVar("Found")
_ALWAYS = {"dtype", "trust_remote_code", "device_map"}  # options that load_moe itself gives
_SMALL = 1 << 28  # values of tables (of rotary embeddings ...) that no file holds


def resolve_folder(
    model: str | Path,
    *,
    gguf_file: str | None = None,
    config: str | Path | None = None,
    progress: ProgressCallback | None = None,
    **hub_options: Any,
) -> Path:
    """Return the local folder of `model`, fetching it from the hub when it is an id.

    Args:
        model: a hub id, a folder, or a GGUF file (any of its splits); a folder of files stands for a GGUF file.
        gguf_file: name of a GGUF file of the folder or the repository, or of any of its splits.
        config: of a GGUF file: a folder or a hub id whose config.json and tokenizer.json win over the file's metadata.
        progress: of a download, called with (bytes done, bytes in all).
        **hub_options: of the download: see `fetch_model`.

    Raises:
        ModelSourceError: neither a folder nor an id the hub (or its local cache) can serve; no such GGUF file, or
            several and none chosen.
    """
    if not isinstance(model, (str, os.PathLike)) or not str(model):
        raise ModelSourceError(f"the model is {model!r:.80}. Give a folder with a checkpoint, or a hub id: org/name.")
    try:
        folder = Path(model).expanduser()
        is_here = folder.is_dir() or is_gguf(folder)
        is_path = folder.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1
    except (OSError, RuntimeError, ValueError) as error:  # no such home, a name too long, a byte of zero, no permission
        raise ModelSourceError(f"{str(model)[:200]!r} cannot be opened as a folder ({one_line(error)}).") from error
    if is_here:
        return gguf_folder_of(folder, gguf_file, config, **hub_options)
    if is_path:
        raise ModelSourceError(
            f"{model} is not a folder. Give a folder with a checkpoint, a GGUF file, or a hub id such as org/name."
        )
    try:
        folder = fetch_model(str(model), gguf_file=gguf_file, progress=progress, **hub_options).folder
    except ModelSourceError as error:
        raise ModelSourceError(f"{model} is not a folder here, and not from the hub: {error}") from error
    return folder if gguf_file is None else gguf_folder_of(folder, gguf_file, config, **hub_options)


def load_tokenizer(model: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer.

    Args:
        model: a hub id or a folder.
        trust_remote_code: whether Python that the folder brings may run.

    Raises:
        CheckpointError: there is none that transformers can load.
        UnsupportedModelError: it needs the folder's own Python.
    """

    def tell(error: BaseException) -> CheckpointError | UnsupportedModelError:
        if "trust_remote_code" in str(error):
            return UnsupportedModelError(
                f"the tokenizer of {model} needs Python code that it brings itself, and moeflow runs none of it unless "
                "told to. Read the code; if you trust it, load the tokenizer in Python with "
                "AutoTokenizer.from_pretrained(..., trust_remote_code=True)."
            )
        return CheckpointError(
            f"{model} has no tokenizer that transformers {transformers.__version__} can load ({one_line(error)}). "
            "Download it again, or use a newer transformers and tokenizers (pip install -U transformers tokenizers)."
        )

    with wall(tell):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer.model_max_length, (int, float)):  # transformers compares it with each prompt's length
        raise CheckpointError(
            f"{model}: model_max_length is {tokenizer.model_max_length!r:.80} in tokenizer_config.json; it must be a "
            "number. Correct it, or download the file again."
        )
    return tokenizer


def model_class(config: PreTrainedConfig) -> Any:
    """Return the transformers class that loads this config: causal LM first, then the one its architecture names."""
    remote = getattr(config, "auto_map", None)  # the classes of a folder's own Python
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping or (isinstance(remote, dict) and auto.__name__ in remote):
            return auto
    for name in config.architectures if isinstance(config.architectures, list) else ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return AutoModel


def _unloadable(config: PreTrainedConfig, options: list[str], error: BaseException) -> ConfigError:
    """Return the error of a config that transformers cannot load a model by; the field is named where it can be."""
    problem = one_line(error)
    if isinstance(error, KeyError) and error.args:  # an unknown name of an activation, a rotary embedding ...
        named = [name for name, value in vars(config).items() if value == error.args[0]]
        if named:
            problem = f"{named[0]} is {error.args[0]!r}, which is unknown to it"
    remedy = f"Correct the options {', '.join(options)}, or" if options else "Correct"
    return ConfigError(
        f"{_source(config)}: transformers {transformers.__version__} cannot load the model ({problem}). {remedy} the "
        "config's field, or download the file again."
    )


def own_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """Return the dtype that a config names, None where it names none.

    Raises:
        ConfigError: no model computes in it.
    """
    found: Any = getattr(config, "dtype", None) or config.get_text_config(decoder=True).dtype
    if isinstance(found, dict):  # one for each part of the model
        return parse_dtype(found[""], f"{_source(config)}: dtype") if "" in found else None
    return None if found is None else parse_dtype(found, f"{_source(config)}: dtype")


def _source(config: PreTrainedConfig) -> str:
    """Name the file that a config was read from, where it is known."""
    file = Path(str(config.name_or_path or "")) / "config.json"
    return str(file) if config.name_or_path and file.is_file() else "the config"


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model on the meta device, with experts and without any weight.

    Raises:
        ConfigError: the config has a field that transformers refuses.
    """
    cls = model_class(config)
    config = copy.deepcopy(config)
    with wall(partial(_unloadable, config, [])), torch.device("meta"):
        if hasattr(cls, "from_config"):
            return cls.from_config(config, dtype=dtype, trust_remote_code=False)
        return cls(config).to(dtype)


def load_without_experts(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    on_empty: Callable[[PreTrainedModel], Found],
    *,
    weights: DenseWeights | None = None,
    **hf_options: Any,
) -> tuple[PreTrainedModel, dict[str, Any], Found]:
    """Run `from_pretrained` for everything but the routed experts.

    Args:
        checkpoint: of the folder to load.
        config: of the model.
        on_empty: called with the empty model, experts still on it, before anything large is read.
        weights: of a GGUF file, in place of the folder's; None where there is none.
        **hf_options: passed to from_pretrained.

    Returns:
        The model, its dense weights unquantised; transformers' loading info; what `on_empty` returned.

    Raises:
        CheckpointError: a dense weight is missing or of another size, a piece of a quantised one is or does not fit, or
            a file changed.
        ConfigError: transformers refuses a field of the config, of the generation config, or an option.
        UnsupportedModelError: a quantised dense weight that is not the model's as it is.
    """
    folder = checkpoint.folder
    cls, scheme = model_class(config), quantization_scheme(config, str(folder))
    stored: dict[str, StoredMatrix] = {}
    found: list[Found] = []
    if scheme is not None:
        stored = find_matrices(checkpoint.tensors, scheme)
        config = copy.deepcopy(config)  # the checkpoint's own quantiser must not see it
        for part in (config, config.get_text_config(decoder=True)):
            part.__dict__.pop("quantization_config", None)

    def strip(empty: PreTrainedModel) -> None:
        try:
            check_sizes(empty, checkpoint)
            check_quantised(empty, stored)
            if weights is not None:
                weights.check(empty)
            found.append(on_empty(empty))
            if weights is not None:
                weights.take_off(empty)
            take_experts_off(empty)
        except Exception as error:
            ours.append(error)
            raise

    ours: list[Exception] = []
    if hf_options.get("generation_config") is None:
        check_generation_file(folder)

    def tell(error: BaseException) -> MoeflowError:
        if isinstance(error, (OSError, SafetensorError)):
            checkpoint.check_unchanged()
            return CheckpointError(f"{folder} cannot be read ({one_line(error)}). Download the checkpoint again.")
        return _unloadable(config, sorted(hf_options.keys() - _ALWAYS), error)

    source: Path | None = folder
    if weights is not None:
        cls, source = cls._model_mapping[type(config)] if hasattr(cls, "_model_mapping") else cls, None
        hf_options = {"generation_config": _generation_config(folder)} | hf_options
        hf_options = {name: value for name, value in hf_options.items() if name != "trust_remote_code"}
        hf_options["state_dict"] = weights.state_dict(ours)
    loading = WithoutExperts(strip, scheme)
    with wall(tell, ours=ours):
        loaded, info = cls.from_pretrained(
            source,
            config=config,
            quantization_config=loading,
            experts_implementation=IMPLEMENTATION,
            use_safetensors=True,
            output_loading_info=True,
            **hf_options,
        )
    if weights is not None:
        weights.fill(loaded)
        loaded.config.name_or_path = loaded.name_or_path = str(folder)  # which transformers was not told
    checkpoint.check_unchanged()  # transformers opened the files anew
    if loading.problems:
        raise CheckpointError(
            f"{folder}: {loading.problems[0]}. Download the checkpoint again, or use another quantisation of the model."
        )
    if info["missing_keys"]:
        raise _incomplete(folder, loaded, sorted(info["missing_keys"]))
    # Our name stays out of the config, of which others may make a model; these experts never ask it.
    loaded.config._experts_implementation = None
    return loaded, info, found[0]


def _generation_config(folder: Path) -> GenerationConfig | None:
    """Return the generation config of a folder; None where it has none."""
    path = folder / "generation_config.json"
    return GenerationConfig.from_dict(read_object(path)) if path.is_file() else None


def _incomplete(folder: Path, loaded: PreTrainedModel, missing: list[str]) -> CheckpointError | UnsupportedModelError:
    """Return the error of weights that are not there: a download that broke off, or another model's head."""
    needed, prefix = type(loaded).__name__, f"{loaded.base_model_prefix}."
    found = ", ".join(map(str, loaded.config.architectures or ["another model"]))[:80]
    if found != needed and not any(name.startswith(prefix) for name in missing):
        return UnsupportedModelError(
            f"{folder} is a checkpoint of {found} and has no {missing[0]}, which load_moe's {needed} needs. Use that "
            "model's checkpoint, or load this one with transformers' from_pretrained."
        )
    lacks = f"{folder} lacks {len(missing)} tensors of the model, the first is {missing[0]}"
    return CheckpointError(f"{lacks}. The checkpoint is incomplete: download it again.")


def check_sizes(empty: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Refuse a model that is larger than its files, or whose weights have other shapes, before memory is taken.

    Args:
        empty: the empty model.
        checkpoint: its files.

    Raises:
        CheckpointError: the config is of another model.
    """
    remedy = "Its config.json is of another model: download it again."
    parameters = dict(empty.named_parameters(remove_duplicate=False))
    wanted = sum(math.prod(tensor.shape) for tensor in (*empty.parameters(), *empty.buffers()))
    held = sum(entry.num_bytes for entry in checkpoint.tensors.values())  # wherever their files are
    held += sum(file.stat().st_size for file in {*checkpoint.folder.iterdir()} - {*checkpoint.files} if file.is_file())
    if wanted > 8 * held + _SMALL:  # no format takes less than a bit for a value
        raise CheckpointError(
            f"{checkpoint.folder}: the config describes a model of {wanted:,} values, and the folder's files have "
            f"{held:,} bytes. {remedy}"
        )
    for name, entry in checkpoint.tensors.items():
        parameter = parameters.get(name)
        if parameter is None or tuple(parameter.shape) == entry.shape:
            continue
        target, pattern = rename_source_key(name, *conversions(empty), empty.base_model_prefix, parameters)
        if target == name and pattern is None:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is {list(parameter.shape)} by the config and {list(entry.shape)} in the "
                f"checkpoint. {remedy}"
            )


def own_dense_weights(model: torch.nn.Module) -> None:
    """Move parameters and buffers on the CPU out of the checkpoint's memory mapping, one at a time.

    Mapped weights would be paged out, and lie at whatever offset the file has, on which a product's last bit depends.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
