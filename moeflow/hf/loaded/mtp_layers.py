"""Layers of multi-token prediction: found in a checkpoint, loaded without their routed experts, and run one by one.

transformers leaves them out of a model, and its `MtpModel` knows how they are made of the model's own classes. Each
takes the hidden states of the layer before and the embeddings of the tokens behind, and says the token after those.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from moeflow.checkpoint.headers import Checkpoint
from moeflow.checkpoint.layer_source import LayerSource
from moeflow.errors import CheckpointError, ConfigError
from moeflow.hf.dense_kernels import speed_up_dense
from moeflow.hf.expert_sources import expert_tensor_names, map_experts
from moeflow.hf.experts_interface import ExpertsModule, experts_modules, transposed
from moeflow.hf.pretrained import own_dense_weights
from moeflow.hf.quantizer import quantization_scheme, take_experts_off
from moeflow.hf.version import parts_of_transformers

with parts_of_transformers():
    from safetensors import safe_open
    from transformers import PreTrainedModel, cache_utils, modeling_layers
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import ContextManagers

NAME = "mtp"
"""Of the source of drafts, and what the names of these layers begin with."""


class FoundMtp(NamedTuple):
    """Layers of multi-token prediction of a checkpoint.

    Args:
        num_layers: how many there are.
        sources: of those with routed experts, where each expert's bytes come from.
        transposed: of the same, whether matrices are stored [in, out].
        dense: names of the checkpoint's tensors for all else.
    """

    num_layers: int
    sources: list[LayerSource]
    transposed: list[bool]
    dense: list[str]


def wants_mtp(speculation: Any) -> bool:
    """Whether an option of speculation asks for drafts of such layers."""
    return isinstance(speculation, Mapping) and NAME in (speculation.get("sources") or ())


def refused_mtp(reason: str) -> ConfigError:
    """Return the error of a model that has no such layers here.

    Args:
        reason: why not, as a sentence's end.
    """
    return ConfigError(
        f"speculation source {NAME!r} needs layers of multi-token prediction: {reason}. Leave {NAME!r} out of the "
        "sources."
    )


def why_no_mtp(model: PreTrainedModel) -> str | None:
    """Return why a model of this config has no such layers here, as a sentence's end; None where it may have."""
    if not hasattr(modeling_layers, "MtpModel"):
        return "this version of transformers knows no such layers"
    if not getattr(model.config.get_text_config(decoder=True), "num_mtp_layers", None):
        return f"transformers makes none for {type(model).__name__} with this config (num_mtp_layers)"
    if not model._keys_to_ignore_on_load_unexpected:
        return f"transformers does not know their weights' names for {type(model).__name__}"
    return None


def find_mtp(empty: PreTrainedModel, checkpoint: Checkpoint) -> FoundMtp:
    """Find the layers of multi-token prediction of a model.

    Args:
        empty: the empty model, experts still on it.
        checkpoint: its files.

    Raises:
        ConfigError: there are none; the message says why.
        CheckpointError: an expert's tensor is missing or has another shape.
        UnsupportedModelError: experts in a form that is not read.
    """
    if reason := why_no_mtp(empty):
        raise refused_mtp(reason)
    if quantization_scheme(empty.config) is not None:
        raise refused_mtp("they are read of checkpoints whose weights are floats")
    try:
        mtp = _empty_mtp(empty)
        wanted = type(mtp).get_mtp_weights_regex(empty)
    except ValueError as error:  # of a config or a family of which transformers cannot make them
        raise refused_mtp(str(error)) from error
    tensors = {name: entry for name, entry in checkpoint.tensors.items() if wanted.search(name)}
    if not tensors:
        raise refused_mtp(f"{checkpoint.folder} has no weights of them")
    mtp._moeflow_conversions = mtp.get_weight_conversions(empty)  # type: ignore[assignment]  # an attribute of ours
    experts = map_experts(mtp, tensors)
    sources = [one._replace(layout=one.layout._replace(name=f"{NAME}.{one.layout.name}")) for one in experts]
    dense = sorted(tensors.keys() - expert_tensor_names(mtp, tensors))
    return FoundMtp(mtp.num_mtp_layers, sources, transposed(mtp), dense)


def load_mtp(model: PreTrainedModel, found: FoundMtp, checkpoint: Checkpoint) -> "MtpLayers":
    """Load these layers beside their model, whose embedding and head they share, without their experts.

    Args:
        model: loaded, on the CPU.
        found: of its checkpoint.
        checkpoint: its files.

    Raises:
        CheckpointError: a weight is missing or has another shape, or a file changed.
    """
    mtp = _empty_mtp(model)
    take_experts_off(mtp)
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(file, framework="pt", device="cpu")) for file in checkpoint.files]
        state = {name: files[checkpoint.tensors[name].file].get_slice(name) for name in found.dense}
        mapping = mtp.get_weight_conversions(model)
        asked = LoadStateDictConfig(weight_mapping=mapping, device_map={"": "cpu"}, dtype=model.dtype)
        info, _ = convert_and_load_state_dict_in_model(model=mtp, state_dict=state, load_config=asked)
    checkpoint.check_unchanged()  # transformers opened the files anew
    left = [name for name, one in (*mtp.named_parameters(), *mtp.named_buffers()) if one.is_meta]
    left += [str(one) for one in (*info.mismatched_keys, *info.conversion_errors)]
    if left:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {left[0]} of its layers of multi-token prediction, or has it in another shape. "
            "Download the checkpoint again, or load it without 'mtp' among speculation's sources."
        )
    layers = MtpLayers(mtp.eval())
    own_dense_weights(layers.own)
    speed_up_dense(layers.own)
    return layers


def _empty_mtp(model: PreTrainedModel) -> Any:
    """Make the layers of a model on the meta device, with its own embedding, head and rotary embedding."""
    kind: Any = modeling_layers.MtpModel
    count = model.config.get_text_config(decoder=True).num_mtp_layers
    with ContextManagers(kind.get_init_context(model.config.dtype, False, False, None)):
        return kind(model, count)


class MtpLayers:
    """Loaded layers of multi-token prediction of one model.

    Args:
        module: transformers' `MtpModel`.

    Attributes:
        own: what is not the model's too.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        shared_norm = [module.shared_post_norm] if module.use_shared_post_norm else []
        self.own = torch.nn.ModuleList([*module.layers, *shared_norm])

    @property
    def num_layers(self) -> int:
        """How many there are: M."""
        return len(self._module.layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that are in memory and not the model's too."""
        return sum(tensor.nbytes for tensor in (*self.own.parameters(), *self.own.buffers()))

    def experts(self) -> list[tuple[str, ExpertsModule]]:
        """List their experts modules with their names."""
        return [(f"{NAME}.{path}", module) for path, module in experts_modules(self._module)]

    def new_cache(self) -> Any:
        """Return an empty cache of their keys and values for one sequence, which `cut` shortens."""
        return cache_utils.MtpCache()

    @torch.no_grad()
    def run(self, layer: int, hidden: torch.Tensor, ids: list[int], first: int, cache: Any) -> torch.Tensor:
        """Run one layer over tokens behind those of its cache, and keep their keys and values there.

        Args:
            layer: 0 to M - 1.
            hidden: [T, H], by the layer before (the model for the first) where it said each of the tokens, or before.
            ids: [T], the tokens.
            first: position of the first in the sequence; the others follow.
            cache: of `new_cache`.

        Returns:
            [T, H].

        Raises:
            ExpertReadError: an expert could not be read.
        """
        positions = torch.arange(first, first + len(ids))[None]
        made = self._module.forward_layer(layer, hidden[None], positions, cache, input_ids=torch.tensor([ids]))
        return made[0]

    @torch.no_grad()
    def likeliest(self, hidden: torch.Tensor) -> tuple[int, float]:
        """Return the likeliest token behind a hidden state [H] that a layer made, and its probability."""
        logits = self._module._project_to_logits(hidden[None])[0].float()
        best = int(logits.argmax())
        return best, float(logits.softmax(-1)[best])

    @staticmethod
    def cut(cache: Any, length: int) -> None:
        """Shorten each layer of a cache to so many tokens, where it has more."""
        for one in cache.layers:
            if (surplus := one.get_seq_length() - length) > 0:
                one.crop(-surplus)
