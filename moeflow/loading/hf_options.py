"""Options of transformers' from_pretrained at load_moe: each is obeyed, or refused with what to use instead.

Knows names and values. Knows nothing of what an option does.
"""

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from moeflow.errors import ConfigError
from moeflow.loading.options import LoadOptions

_OBEYED = (
    "attn_implementation",
    "cache_dir",
    "config",
    "disable_mmap",
    "force_download",
    "generation_config",
    "gguf_file",
    "ignore_mismatched_sizes",
    "local_files_only",
    "output_loading_info",
    "revision",
    "token",
    "trust_remote_code",
)
# What load_moe does anyway: these values change nothing.
_ALWAYS_SO = {"low_cpu_mem_usage": True, "use_safetensors": True, "weights_only": True}
_ON_DISK = "experts stay in the checkpoint's own files; expert_memory= says how much of them is in memory"
_PROCESSES = "experts are spread over processes by `moeflow parallel`"
_KERNELS = "moeflow brings its own kernels"
_LATER = "load the model, then call model.load_adapter"
_REFUSED = {
    "device_map": "give device= instead: the dense weights go to one device",
    "max_memory": "give expert_memory=, and on a GPU host_memory=; the dense weights go to device= as a whole",
    "offload_folder": _ON_DISK,
    "offload_buffers": _ON_DISK,
    "offload_state_dict": _ON_DISK,
    "low_cpu_mem_usage": "weights are never in memory twice",
    "use_safetensors": "moeflow reads safetensors only and never unpickles",
    "weights_only": "moeflow never unpickles weights",
    "load_in_8bit": 'give quantization="int8" instead',
    "load_in_4bit": 'give quantization="int4" instead',
    "quantization_config": "a quantised checkpoint is read as it is; quantization= quantises another's experts",
    "experts_implementation": "load_moe is an experts implementation itself",
    "state_dict": "weights are read from the checkpoint only",
    "variant": "experts and dense weights would come from different files",
    "subfolder": "give that folder as the model",
    "torch_dtype": "it is called dtype",
    "use_auth_token": "it is called token",
    "key_mapping": "experts are found by transformers' own mapping",
    "adapter_kwargs": _LATER,
    "adapter_name": _LATER,
    "tp_plan": _PROCESSES,
    "tp_size": _PROCESSES,
    "device_mesh": _PROCESSES,
    "distributed_config": _PROCESSES,
    "use_kernels": _KERNELS,
    "kernel_config": _KERNELS,
    "fusion_config": _KERNELS,
    "allow_all_kernels": _KERNELS,
}


def taken_hf_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options without those that are left open or ask for what load_moe does anyway.

    Args:
        given: options of from_pretrained, and fields of the config.

    Raises:
        ConfigError: one cannot be obeyed; the message names what to use instead.
    """
    taken = {name: value for name, value in given.items() if name not in _REFUSED}
    for name, value in given.items():
        if name not in _REFUSED or value is None or value is _ALWAYS_SO.get(name, False):
            continue
        raise ConfigError(f"load_moe does not take {name}: {_REFUSED[name]}.")
    return taken


def refuse_unknown(names: Iterable[str]) -> None:
    """Refuse what is neither an option nor a field of the config; transformers would drop some of these in silence.

    Args:
        names: of options, those taken out that are fields of the config.

    Raises:
        ConfigError: for the first; the message names one that is written alike.
    """
    for name in names:
        if name not in _OBEYED:
            known = [*(option.name for option in fields(LoadOptions)), *_OBEYED]
            alike = difflib.get_close_matches(name, known, 1)
            hint = f"Did you mean {alike[0]}?" if alike else "Leave it out."
            raise ConfigError(
                f"load_moe does not take {name}: it is no option, and no field of this model's config. {hint}"
            )
