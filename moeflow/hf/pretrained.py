"""Loads from a folder through transformers: config, tokenizer, the empty model, the model without its experts.

Knows folders, configs and from_pretrained. Knows nothing of where an expert's bytes lie: see `model_folder`.
"""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from moeflow.checkpoint.headers import Checkpoint
from moeflow.checkpoint.prequantized import StoredMatrix, find_matrices
from moeflow.errors import CheckpointError, ModelSourceError, UnsupportedModelError
from moeflow.formatting import brief
from moeflow.hf.experts_interface import IMPLEMENTATION, conversions, experts_modules
from moeflow.hf.quantizer import WithoutExperts, quantization_scheme
from moeflow.hf.version import parts_of_transformers

with parts_of_transformers():
    import transformers
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )
    from transformers.core_model_loading import rename_source_key

Found = TypeVar("Found")


def resolve_folder(model: str | Path, **hub_options: Any) -> Path:
    """Return the local folder of `model`, fetching it from the hub when it is an id.

    Args:
        model: a hub id or a folder.
        **hub_options: of the download.

    Raises:
        ModelSourceError: neither a folder nor an id the hub (or its local cache) can serve.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        raise ModelSourceError(
            f"{model} is not a folder. Give a folder with a checkpoint, or a hub id such as org/name."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(model),
                allow_patterns=["*.json", "*.safetensors", "*.moeflow", "*.jinja", "*.model", "*.txt", "*.py"],
                ignore_patterns=["original/*", "consolidated*"],
                **hub_options,
            )
        )
    except (OSError, ValueError) as error:
        raise ModelSourceError(
            f"{model} is not a folder here and could not be fetched from the hub ({type(error).__name__}: {error}). "
            "Check the name and the network, or download the model and give its folder."
        ) from error


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read config.json and refuse what this version cannot run.

    Args:
        folder: of the checkpoint.
        trust_remote_code: whether Python that the folder brings may run.

    Raises:
        CheckpointError: no or a corrupt config.json.
        UnsupportedModelError: an unknown architecture, one that needs the folder's own Python, or a checkpoint
            quantised by a method that is not read.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json. Give a folder written by save_pretrained or the hub.")
    try:
        json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}). Download it again.") from None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError) as error:
        if _asks_for_trust(error):
            raise UnsupportedModelError(
                f"{folder} needs Python code that it brings itself, and moeflow runs none of it unless told to. Read "
                "the code; if you trust it, load the model in Python with load_moe(..., trust_remote_code=True)."
            ) from None
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not know the model in {folder}: {error} "
            "A newer transformers may (pip install -U transformers)."
        ) from error
    quantization_scheme(config, str(folder))
    return config


def load_tokenizer(model: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer.

    Args:
        model: a hub id or a folder.
        trust_remote_code: whether Python that the folder brings may run.

    Raises:
        CheckpointError: there is none that transformers can load.
        UnsupportedModelError: it needs the folder's own Python.
    """
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if _asks_for_trust(error):
            raise UnsupportedModelError(
                f"the tokenizer of {model} needs Python code that it brings itself, and moeflow runs none of it unless "
                "told to. Read the code; if you trust it, load the tokenizer in Python with "
                "AutoTokenizer.from_pretrained(..., trust_remote_code=True)."
            ) from None
        raise CheckpointError(
            f"{model} has no tokenizer that transformers can load ({error}). Download it again."
        ) from error


def _asks_for_trust(error: Exception) -> bool:
    """Tell whether transformers refused to run a folder's own Python. It has no error class for that."""
    return "trust_remote_code" in str(error)


def model_class(config: PreTrainedConfig) -> Any:
    """Return the transformers class that loads this config: causal LM first, then the one its architecture names."""
    remote = getattr(config, "auto_map", None) or {}  # the classes of a folder's own Python
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping or auto.__name__ in remote:
            return auto
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return AutoModel


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model on the meta device, with experts and without any weight."""
    cls = model_class(config)
    config = copy.deepcopy(config)
    with torch.device("meta"):
        if hasattr(cls, "from_config"):
            return cls.from_config(config, dtype=dtype, trust_remote_code=False)
        return cls(config).to(dtype)


def load_without_experts(
    checkpoint: Checkpoint, config: PreTrainedConfig, on_empty: Callable[[PreTrainedModel], Found], **hf_options: Any
) -> tuple[PreTrainedModel, dict[str, Any], Found]:
    """Run `from_pretrained` for everything but the routed experts.

    Args:
        checkpoint: of the folder to load.
        config: of the model.
        on_empty: called with the empty model, experts still on it, before anything large is read.
        **hf_options: passed to from_pretrained.

    Returns:
        The model, its dense weights unquantised; transformers' loading info; what `on_empty` returned.

    Raises:
        CheckpointError: a dense weight is missing, a piece of a quantised one is or does not fit, or a file changed.
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
        _check_dense(empty, stored)
        found.append(on_empty(empty))
        _take_experts_off(empty)

    loading = WithoutExperts(strip, scheme)
    try:
        loaded, info = cls.from_pretrained(
            folder,
            config=config,
            quantization_config=loading,
            experts_implementation=IMPLEMENTATION,
            use_safetensors=True,
            output_loading_info=True,
            **hf_options,
        )
    except (OSError, SafetensorError) as error:
        checkpoint.check_unchanged()
        raise CheckpointError(f"{folder} cannot be read ({brief(error)}). Download the checkpoint again.") from error
    checkpoint.check_unchanged()  # transformers opened the files anew
    if loading.problems:
        raise CheckpointError(
            f"{folder}: {loading.problems[0]}. Download the checkpoint again, or use another quantisation of the model."
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of the model, the first is {missing[0]}. "
            "The checkpoint is incomplete: download it again."
        )
    # Our name stays out of the config, of which others may make a model; these experts never ask it.
    loaded.config._experts_implementation = None
    return loaded, info, found[0]


def _check_dense(model: PreTrainedModel, stored: dict[str, StoredMatrix]) -> None:
    """Refuse quantised dense weights that cannot be loaded one by one, before anything large is read."""
    if not stored:
        return
    parameters, renamings, converters = model.state_dict(), *conversions(model)
    for name, matrix in stored.items():
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        parameter = parameters.get(target)
        if parameter is None or parameter.dim() == 3:  # stacked experts
            continue
        if pattern is not None:
            raise UnsupportedModelError(
                f"{name} is quantised, and {type(model).__name__} has it in another form ({target}), into which "
                "moeflow does not bring quantised dense weights. Use the model's float32 or bfloat16 checkpoint."
            )
        if tuple(parameter.shape) != matrix.shape:
            raise CheckpointError(
                f"{target} is {list(parameter.shape)}, the checkpoint's {name} {list(matrix.shape)} (out, in "
                "features). Its config.json is of another model, or names another quantisation."
            )


def _take_experts_off(model: PreTrainedModel) -> None:
    """Remove the routed experts' parameters from an empty model and keep the loader quiet about them."""
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    scheme = quantization_scheme(model.config)
    if scheme is not None and scheme.method == "gptq":
        ignored.add(r"\.bias$")  # some tools write a bias of zeros beside every matrix
    for path, module in experts_modules(model):
        tail = path.removeprefix(f"{model.base_model_prefix}.")
        if scheme is not None:  # the pieces have other names than the parameters
            ignored.add(r"(^|\.)" + re.escape(f"{tail}."))
        for name in list(module._parameters):
            # An attribute of the right shape without memory stays: some families' init code reads it.
            stub: Any = module._parameters.pop(name)
            if stub is not None:
                stub._is_hf_initialized = True
            module.__dict__[name] = stub
            ignored.add(r"(^|\.)" + re.escape(f"{tail}.{name}") + "$")
            for submodule in model.modules():
                getattr(submodule, "all_tied_weights_keys", {}).pop(f"{path}.{name}", None)
        module._is_hf_initialized = True
    model._keys_to_ignore_on_load_unexpected = ignored


def own_dense_weights(model: PreTrainedModel) -> None:
    """Move parameters and buffers on the CPU out of the checkpoint's memory mapping, one at a time.

    Mapped weights would be paged out under memory pressure, and lie at whatever offset the file has, on which the
    last bit of a matrix product depends.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
