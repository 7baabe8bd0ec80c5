"""A model as it lies on disk: its folder, config and checkpoint, and where its experts' bytes come from.

Knows where to look. Knows nothing of budgets or devices. Every way of opening a model begins here.
"""

import copy
import json
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from moeflow.checkpoint.gguf.file import GgufFile
from moeflow.checkpoint.headers import Checkpoint, open_checkpoint
from moeflow.checkpoint.layer_source import LayerSource
from moeflow.checkpoint.lossless_source import with_checks
from moeflow.checkpoint.packed_file import PACKED_FILE, packed_dtype, read_packed
from moeflow.checkpoint.reading.file_stamp import FileStamp
from moeflow.dtypes import FLOAT_DTYPES
from moeflow.errors import ConfigError, UnsupportedModelError
from moeflow.hf import pretrained
from moeflow.hf.expert_sources import expert_tensor_names, map_experts, map_layouts
from moeflow.hf.experts_interface import expert_parameters, experts_modules
from moeflow.hf.files.config import check_counts, load_config
from moeflow.hf.gguf.architectures import find_architecture
from moeflow.hf.gguf.dense_weights import DenseWeights
from moeflow.hf.gguf.expert_sources import map_blocks
from moeflow.hf.gguf.feeding import Fed, feed
from moeflow.hf.gguf.folder import open_gguf_of
from moeflow.hf.wall import one_line, wall
from moeflow.kernels.quantization.ggml import BLOCK_TYPES

_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def _refused_option(name: str, value: Any, error: BaseException) -> ConfigError:
    return ConfigError(
        f"{name}={value!r:.80} is refused by the model's config ({one_line(error)}). Correct it, or leave it out."
    )


class ModelFolder:
    """One model on disk. Config and headers are read when first asked for, weights never.

    Args:
        model: a hub id or a folder.
        config: in place of the folder's own.
        checkpoint: its headers, where the weights are not in the folder.
        gguf_file: name of a GGUF file in it, or of any of its splits.
        own_files: of a GGUF file: a folder or hub id whose config.json and tokenizer.json win over what the file tells.
        **hub_options: for the download of a hub id.

    Raises:
        ModelSourceError: no such folder or hub id.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        checkpoint: Checkpoint | None = None,
        gguf_file: str | None = None,
        own_files: str | Path | None = None,
        **hub_options: Any,
    ) -> None:
        # Absolute, so that a later chdir does not move it; links stay, as transformers sees them.
        found = pretrained.resolve_folder(model, gguf_file=gguf_file, config=own_files, **hub_options)
        self.path = found.absolute()
        if config is not None:
            self.config = config
        if checkpoint is not None:
            self.checkpoint = checkpoint

    @classmethod
    def of_hf_options(cls, model: str | Path, hf_options: dict[str, Any]) -> "ModelFolder":
        """Open a model as from_pretrained would with these options.

        Args:
            model: a hub id or a folder.
            hf_options: of from_pretrained; `config`, `gguf_file` and those that are values of the config are taken out,
                and `trust_remote_code` is set to False where it is left open.
        """
        # Where it is left open, transformers asks on standard input, and a piped prompt would answer.
        hf_options["trust_remote_code"] = bool(hf_options.get("trust_remote_code"))
        config, gguf_file = hf_options.pop("config", None), hf_options.pop("gguf_file", None)
        hub_options = {name: hf_options[name] for name in _HUB_OPTIONS if name in hf_options}
        own_files = config if isinstance(config, (str, Path)) else None
        folder = cls(model, gguf_file=gguf_file, own_files=own_files, **hub_options)
        _refuse_adapter(folder.path)
        if own_files is not None and folder.gguf is not None:
            config = None  # its files are in the folder
        if config is None or isinstance(config, (str, Path)):
            trusted = hf_options["trust_remote_code"]
            config = load_config(Path(config or folder.path), trust_remote_code=trusted)
        if not isinstance(config, PreTrainedConfig):
            raise ConfigError(
                f"config is a {type(config).__name__}. Give a config of transformers or a folder with one. Single "
                "fields are options of load_moe, as in num_experts_per_tok=1."
            )
        folder.config = copy.deepcopy(config)  # the caller's stays as it is
        known = {*config.to_dict(), *config.attribute_map}
        for name in [name for name in hf_options if name in known]:
            value = hf_options.pop(name)
            with wall(partial(_refused_option, name, value)):
                setattr(folder.config, name, value)
        check_counts(folder.config.to_dict(), "the config")
        return folder

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's config.

        Raises:
            CheckpointError: no or a corrupt config.json.
            ConfigError: a field of it is wrong.
            UnsupportedModelError: an architecture or a quantisation that is not read.
        """
        return load_config(self.path)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint's headers.

        Raises:
            CheckpointError: weights are missing, truncated or corrupt.
        """
        if self.gguf is None:
            return open_checkpoint(self.path)
        return Checkpoint(self.path, self.gguf.files, self.gguf.tensors, self.gguf.stamps, None)

    @cached_property
    def gguf(self) -> GgufFile | None:
        """The GGUF file that the folder stands for; None where its weights are safetensors.

        Raises:
            CheckpointError: the file is missing, truncated or corrupt.
        """
        return open_gguf_of(self.path)

    @property
    def name(self) -> str:
        """What messages call the model: its GGUF file, or its folder."""
        return str(self.path if self.gguf is None or self.packed else self.gguf.files[0])

    @property
    def gguf_architecture(self) -> str | None:
        """The architecture as the GGUF file names it; None without one."""
        return None if self.gguf is None else self.gguf.metadata["general.architecture"]

    @cached_property
    def packed(self) -> bool:
        """Whether experts lie in a packed file."""
        return (self.path / PACKED_FILE).is_file()

    @property
    def expert_files(self) -> list[Path]:
        """The files that the experts' piece tables number."""
        return [self.path / PACKED_FILE] if self.packed else self.checkpoint.files

    @cached_property
    def expert_stamps(self) -> list[FileStamp]:
        """The stamps of `expert_files` from before their headers were read."""
        return [FileStamp.of(file) for file in self.expert_files] if self.packed else self.checkpoint.stamps

    @property
    def packed_file(self) -> tuple[Path, FileStamp] | None:
        """The packed file of experts and its stamp; None where they lie in the checkpoint."""
        return (self.expert_files[0], self.expert_stamps[0]) if self.packed else None

    @cached_property
    def dtype(self) -> torch.dtype:
        """The model's dtype where nothing else is asked for: the config's, else its weights', as transformers has it.

        In a packed folder the experts tell, if they are not in a weight format.
        """
        found = pretrained.own_dtype(self.config)
        if found is not None:
            return found
        of_weights = (packed_dtype(self.path) if self.packed else None) or self.checkpoint.dtype or ""
        named = FLOAT_DTYPES.get(of_weights) or getattr(torch, of_weights, None)
        return named if isinstance(named, torch.dtype) else torch.float32

    def links_out(self) -> dict[str, str]:
        """Return the weights' files that are links out of the folder, with their targets; a hub cache's are its own.

        A GGUF file has none: the folder only stands for it.
        """
        if self.gguf is not None:
            return {}
        home = self.path.resolve()
        if home.parent.name == "snapshots":
            home = home.parent.parent  # snapshots link to blobs beside them
        targets = {file: file.resolve() for file in dict.fromkeys((*self.checkpoint.files, *self.expert_files))}
        return {
            str(file.relative_to(self.path)): str(target)
            for file, target in targets.items()
            if not target.is_relative_to(home)
        }

    def empty_model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Build the model on the meta device, with experts and without any weight.

        Args:
            dtype: of it; None for the model's.

        Raises:
            ConfigError: a field of the config is wrong.
            CheckpointError: the config describes another model than the files hold.
        """
        empty = pretrained.empty_model(self.config, dtype or self.dtype)
        pretrained.check_sizes(empty, self.checkpoint)
        return empty

    def layers(self, empty: PreTrainedModel) -> list[LayerSource]:
        """Find every expert's bytes, [num_layers].

        Args:
            empty: the empty model, experts still on it; its dtype is the dtype of unquantised records.

        Raises:
            CheckpointError: an expert is missing, or the files are of another model or dtype.
            UnsupportedModelError: a dense model, or experts in a form that is not read.
        """
        if self.packed:
            _ = self.expert_stamps
            return with_checks(read_packed(self.path, map_layouts(empty)))
        if self.gguf is not None:
            return map_blocks(empty, self.gguf.tensors, self.fed(empty))
        return map_experts(empty, self.checkpoint.tensors)

    def feeding(self, empty: PreTrainedModel) -> set[str]:
        """Return the names of the checkpoint's tensors that feed routed experts; a packed folder has none."""
        if self.packed:
            return set()
        if self.gguf is None:
            return expert_tensor_names(empty, self.checkpoint.tensors)
        fed, names = self.fed(empty), expert_parameters(empty)
        counts = {path: module.num_experts for path, module in experts_modules(empty)}
        return {
            tensor
            for name in names & fed.keys()
            for expert in range(counts[name.rpartition(".")[0]] if fed[name].is_per_expert else 1)
            for tensor in fed[name].of_expert(expert)
        }

    def dense_weights(self, dtype: Any, *, keeps_blocks: bool) -> DenseWeights | None:
        """Return the dense weights of a GGUF file; None where transformers reads them from safetensors.

        Args:
            dtype: as from_pretrained has it; where it names none or several, the model's own counts for blocks.
            keeps_blocks: whether linears and embeddings stay in the file's blocks.

        Raises:
            CheckpointError: the file has a tensor that has no place in the model.
        """
        if self.gguf is None:
            return None
        empty = self.empty_model()
        of_blocks = dtype if isinstance(dtype, torch.dtype) else self.dtype
        return DenseWeights(
            self.gguf, self.config, self.fed(empty), expert_parameters(empty), of_blocks, keeps_blocks=keeps_blocks
        )

    def fed(self, empty: PreTrainedModel) -> dict[str, Fed]:
        """Return what feeds each parameter of the empty model in the GGUF file, where the folder stands for one."""
        assert self.gguf is not None, "asked only where there is one"
        for name, entry in self.gguf.tensors.items():
            if not BLOCK_TYPES[entry.dtype].format:
                raise UnsupportedModelError(
                    f"{self.gguf.files[entry.file]}: {name} is stored as {entry.dtype}, which moeflow does not read. "
                    "Use another file of the model: docs/gguf.md lists the types."
                )
        architecture = find_architecture(self.gguf.metadata["general.architecture"])
        names = [name for name, _ in empty.named_parameters(remove_duplicate=False)]
        persistent = empty.state_dict().keys()
        names += [name for name, _ in empty.named_buffers() if name in persistent]
        return feed(architecture, self.config, names, self.gguf.tensors)


def _refuse_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter: from_pretrained would apply it while the experts are not there."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    base = str(folder)
    if not (folder / "config.json").is_file():
        try:
            base = json.loads(file.read_bytes())["base_model_name_or_path"]
        except (ValueError, KeyError, TypeError):
            base = "its base model"
    raise ConfigError(
        f"{file} is of an adapter, which load_moe does not apply. Load {base} without that file, then the adapter from "
        "a folder of its own: model.load_adapter(folder), or PEFT's PeftModel.from_pretrained(model, folder)."
    )
