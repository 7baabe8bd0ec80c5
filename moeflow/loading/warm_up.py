"""A first pass of a model on a GPU, before it has any expert there: how many bytes its activations take.

Knows passes and counters of memory. Knows nothing of budgets.
"""

import inspect
import logging
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from moeflow.hf import experts_interface
from moeflow.hf.passes.forward import vocab_size
from moeflow.loading.gpu_memory import GpuMemory

_log = logging.getLogger(__name__)


class WarmUp(NamedTuple):
    """What the first pass told.

    Args:
        context: tokens of the pass.
        peak_bytes: of its activations, without keys and values or experts' outputs; None where it failed.
        failure: why it failed, in one line.
    """

    context: int
    peak_bytes: int | None
    failure: str | None = None


def warm_up(model: PreTrainedModel, memory: GpuMemory, context: int) -> WarmUp:
    """Run a pass over random tokens, as `generate` runs a prompt, and measure it.

    Experts give zeros: their outputs are counted for themselves, since they depend on how many tokens run at once.

    Args:
        model: its experts taken off, with nothing behind them yet; it is as it was afterwards.
        memory: of its GPU.
        context: tokens, at most as many as the model was made for.
    """
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    # Beyond that, rotary embeddings that scale by the length would remember it.
    context = min(context, most) if isinstance(most, int) and most > 0 else context
    modules = [module for _, module in experts_interface.experts_modules(model)]
    try:
        for module in modules:
            module.forward = _zeros
        return WarmUp(context, memory.peak_of(lambda: _pass(model, context)))
    except Exception as error:  # a family's own code, or the GPU's
        failure = f"{type(error).__name__}: {error}".partition("\n")[0]
    finally:
        for module in modules:
            vars(module).pop("forward", None)
    _log.warning(
        "a pass over %d tokens could not be measured (%s): room for activations is an estimate. Where passes run out "
        "of memory, give a smaller expert_memory.",
        context,
        failure,
    )
    return WarmUp(context, None, failure)


@torch.no_grad()
def _pass(model: PreTrainedModel, context: int) -> None:
    random = torch.Generator().manual_seed(0)  # of its own: the user's numbers stay as they are
    tokens = torch.randint(vocab_size(model), (1, context), generator=random)
    is_cut = "logits_to_keep" in inspect.signature(model.forward).parameters
    model(input_ids=tokens.to(model.device), use_cache=False, **({"logits_to_keep": 1} if is_cut else {}))


def _zeros(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(hidden_states)])  # parts, and the whole that they are put together to
