"""The speculation of an engine, or why it has none."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeflow.engine.model_runner import ModelRunner
from moeflow.engine.speculation.draft_model import DraftModel
from moeflow.engine.speculation.drafts import DraftSource
from moeflow.engine.speculation.options import SpeculationOption, SpeculationOptions, speculation_options
from moeflow.engine.speculation.prompt_lookup import PromptLookup
from moeflow.engine.speculation.speculation import EXACT_ROWS, MOST_ROWS, Speculation
from moeflow.engine.speculation.token_recycling import TokenRecycling
from moeflow.hf import experts_interface
from moeflow.hf.passes import forward
from moeflow.policy.speculation import SpeculationGate, StepTimes

_SOURCES = {one.name: one for one in (PromptLookup, TokenRecycling)}


def speculation_for(
    option: SpeculationOption,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    runner: Any,
    max_step_tokens: int,
) -> Speculation:
    """Return the speculation of an engine; one that says why there is none, where that is so.

    Args:
        option: of `Engine`; "auto" is what the model was loaded with.
        model: that verifies.
        tokenizer: its tokenizer.
        runner: of the engine.
        max_step_tokens: most tokens of a step; 0 where steps are cut into passes.

    Raises:
        ConfigError: the option is not allowed, or the draft model does not fit.
    """
    if option == "auto":
        option = getattr(model, "_moeflow_speculation", "off")
    asked = speculation_options(option)
    options = asked or SpeculationOptions()
    reason = None
    if not isinstance(runner, ModelRunner):
        reason = "the model runs one sequence at a time"
    elif asked is None:
        reason = "not asked for"
    elif not max_step_tokens:
        reason = "steps are cut into groups"
    elif runner.scales_by_length:
        reason = "positions are scaled by the length of the text, so that each token needs a pass of its own"
    elif not options.packed and getattr(getattr(model, "moeflow", None), "step", None) is None:
        reason = "steps do not run natively, and drafts would change last bits"
    else:
        runner.packed_drafts = options.packed
    vocab_size = forward.vocab_size(model)
    sources: list[DraftSource] = []
    if reason is None:
        sources += [_SOURCES[name]() for name in options.sources]
        if options.draft_model is not None:
            sources.append(DraftModel(options.draft_model, vocab_size, options.draft_tokenizer, tokenizer))
    gate = SpeculationGate(StepTimes() if reason else _times(model), MOST_ROWS if options.packed else EXACT_ROWS)
    return Speculation(options, sources, gate, vocab_size, runner, max_step_tokens, reason)


def _times(model: Any) -> StepTimes:
    """Return times that begin with the union of experts that rows of the model would choose at random."""
    runtime = getattr(model, "moeflow", None)
    if runtime is None:
        return StepTimes()
    return StepTimes(max(runtime.experts_per_layer), experts_interface.num_experts_per_tok(model))
