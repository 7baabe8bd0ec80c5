"""The speculation of an engine, or why it has none."""

import logging
import time
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeflow.engine.model_runner import ModelRunner
from moeflow.engine.speculation.drafts import DraftSource
from moeflow.engine.speculation.foreseen_waits import ForeseenWaits
from moeflow.engine.speculation.mtp import MtpSource
from moeflow.engine.speculation.options import SpeculationOption, SpeculationOptions, speculation_options
from moeflow.engine.speculation.prompt_lookup import PromptLookup
from moeflow.engine.speculation.speculation import MOST_ROWS, Speculation
from moeflow.engine.speculation.through_text import draft_source
from moeflow.engine.speculation.token_recycling import TokenRecycling
from moeflow.errors import MoeflowError
from moeflow.hf import experts_interface
from moeflow.hf.passes import forward
from moeflow.hf.passes.step_rows import EXACT_ROWS
from moeflow.policy.speculation import SpeculationGate
from moeflow.policy.step_times import StepTimes

if TYPE_CHECKING:
    from moeflow.offload.runtime import ExpertRuntime
    from moeflow.step.decoding import StepDecoding

_log = logging.getLogger(__name__)

PROGRAM_ROWS = (2, 4, 8)
"""Rows of the programs that steps with drafts run, as far as each row has the bits that it has alone."""
_SOURCES = {one.name: one for one in (PromptLookup, TokenRecycling)}  # that need no model


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
        ConfigError: the option is not allowed, the draft model does not fit, or the model was loaded without layers of
            multi-token prediction and they are asked for.
    """
    if option == "auto":
        option = getattr(model, "_moeflow_speculation", "off")
    asked = speculation_options(option)
    options = asked or SpeculationOptions()
    reason = None
    if not isinstance(runner, ModelRunner):
        reason = "the model runs one sequence at a time"
        if state := forward.other_state(model):
            reason = f"the model keeps state ({', '.join(state)}) from which a rejected token cannot be taken back"
    elif asked is None:
        reason = "not asked for"
    elif not max_step_tokens:
        reason = "steps are cut into groups"
    elif runner.policy_name is not None:
        reason = f"the policy {runner.policy_name} acts in the model's own attention, where no native step runs"
    elif runner.scales_by_length:
        reason = "positions are scaled by the length of the text, so that each token needs a pass of its own"
    elif not options.packed and getattr(getattr(model, "moeflow", None), "step", None) is None:
        reason = "steps do not run natively, and drafts would change last bits"
    else:
        runner.packed_drafts = options.packed
    vocab_size = forward.vocab_size(model)
    sources: list[DraftSource] = []
    if reason is None:
        sources += [_SOURCES[name]() for name in options.sources if name != MtpSource.name]
        if MtpSource.name in options.sources:
            runner.hidden = source = MtpSource(model)
            sources.append(source)
        if options.draft_model is not None:
            sources.append(draft_source(options.draft_model, vocab_size, options.draft_tokenizer, tokenizer))
    times, foreseen = StepTimes(), None
    runtime: ExpertRuntime | None = getattr(model, "moeflow", None)
    if reason is None and runtime is not None:
        top_k = experts_interface.num_experts_per_tok(model)
        times = StepTimes(max(runtime.experts_per_layer), top_k)
        runner.routes = foreseen = ForeseenWaits(runtime, top_k)
        _prepare(runtime.step, min(max_step_tokens, EXACT_ROWS))
    gate = SpeculationGate(times, MOST_ROWS if options.packed else EXACT_ROWS)
    return Speculation(options, sources, gate, vocab_size, runner, max_step_tokens, reason, foreseen)


def _prepare(step: "StepDecoding | None", most_rows: int) -> None:
    """Make the programs of several rows ready now, so that no answer stands still at the first step that needs one."""
    sizes = [rows for rows in PROGRAM_ROWS if rows <= most_rows]
    if step is None or not sizes:
        return
    begin = time.perf_counter()
    try:
        for rows in sizes:
            step.prepare(rows)
    except (MoeflowError, OSError, MemoryError) as error:
        _log.info("programs for drafts are made at the first step with one: %s", error)
    else:
        seconds = time.perf_counter() - begin
        _log.info("programs of %s rows are ready for drafts, in %.1f s", ", ".join(map(str, sizes)), seconds)
