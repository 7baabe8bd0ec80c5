"""Forward passes as transformers runs them: their tokens, their key-value cache, their attention, where decoding ends.

For rooms that run passes themselves, and for those that watch the passes of `generate`.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from moeflow.errors import ConfigError, UnsupportedModelError
from moeflow.hf.version import parts_of_transformers

with parts_of_transformers():
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache, DynamicCache

KeyValueCache = Cache
_SAMPLING_DEFAULTS = {
    "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
}  # fmt: skip
# Generation settings that SamplingParams has, that answers of one sequence do not depend on, or that only say how.
_NOT_OF_TOKENS = {
    *_SAMPLING_DEFAULTS, "eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "stop_strings",
    "max_length", "max_new_tokens", "num_beams", "early_stopping", "length_penalty", "num_beam_groups",
    "diversity_penalty", "num_return_sequences", "use_cache", "cache_implementation", "cache_config", "max_cache_len",
    "prefill_chunk_size", "low_memory", "compile_config", "disable_compile", "continuous_batching_config",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
    "transformers_version", "_from_model_config",
}  # fmt: skip
_KEY_VALUE_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}  # a dummy keeps nothing


class ForwardPass(NamedTuple):
    """One forward pass of a model over new tokens.

    Args:
        num_sequences: S.
        num_positions: P, new positions of each sequence.
        continues: whether earlier positions lie in a key-value cache: with one position, the pass decodes.
        token_ids: [S, P]; None where only embeddings are known, or tokens that do not go on with the last pass's rows.
        attention_mask: as the model was called with it, usually [S, positions so far], 0 hides one; None hides nothing.
        cache: the key-value cache, by which its sequences are recognised; None where there is none.
    """

    num_sequences: int
    num_positions: int
    continues: bool
    token_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    cache: object = None

    @property
    def num_kept(self) -> int | None:
        """Positions of each sequence that its cache keeps; None where there is none, or an engine has its own."""
        if not hasattr(self.cache, "get_seq_length") or hasattr(self.cache, "describe_pass"):
            return None
        try:
            return int(self.cache.get_seq_length())
        except ValueError:  # it keeps no positions
            return None


def describe_pass(args: tuple, kwargs: dict[str, Any]) -> ForwardPass | None:
    """Describe the pass that a model's forward is called for; None where it is given no tokens in rows.

    Args:
        args: positional arguments of forward, as its hooks see them.
        kwargs: its keyword arguments.
    """
    ids = kwargs.get("input_ids")
    if ids is None:
        ids = kwargs.get("inputs_embeds")
    if ids is None:
        ids = args[0] if args else None
    if not isinstance(ids, torch.Tensor) or ids.dim() < 2:  # which the model refuses
        return None
    cache = kwargs.get("past_key_values")
    cache = kwargs.get("cache") if cache is None else cache  # its name from transformers 5.24 on
    describe = getattr(cache, "describe_pass", None)  # a cache that holds many sequences knows better
    if describe is not None:
        num_sequences, num_positions, continues, token_ids = describe(ids)
    else:
        num_sequences, num_positions, token_ids = ids.shape[0], ids.shape[1], ids if ids.dim() == 2 else None
        continues = _continues(cache, num_positions)
    mask = kwargs.get("attention_mask")
    return ForwardPass(num_sequences, num_positions, continues, token_ids, mask, cache)


def _continues(cache: Any, num_positions: int) -> bool:
    """Tell whether a pass with this cache continues earlier positions: decode, not prefill."""
    if hasattr(cache, "get_seq_length"):
        return bool(cache.get_seq_length() > 0)
    # a cache without a length (state-space models): one position at a time is decode
    return cache is not None and num_positions == 1


def key_value_bytes_per_position(model: PreTrainedModel) -> int:
    """Estimate the key-value cache of one position, from the attention modules' projections."""
    features = 0
    for module in model.modules():
        for names in (("k_proj", "v_proj"), ("kv_b_proj",), ("qkv_proj",), ("query_key_value",)):
            found = [getattr(module, name, None) for name in names]
            projections = [projection for projection in found if isinstance(projection, torch.nn.Linear)]
            if len(projections) == len(names):
                features += sum(projection.out_features for projection in projections)
                break
    return features * model.dtype.itemsize


def check_key_value_cache(model: PreTrainedModel) -> None:
    """Refuse a model that keeps other state of earlier positions than keys and values.

    Raises:
        UnsupportedModelError: the message names what it keeps.
    """
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__} is not a decoder that generates token by token.")
    kept = other_state(model)
    if kept:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps other state than keys and values ({', '.join(kept)}), of which the engine "
            "knows nothing. Call model.generate instead."
        )


def other_state(model: PreTrainedModel) -> list[str]:
    """Return the kinds of layers of a model's cache that keep other state than keys and values."""
    return sorted({type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - _KEY_VALUE_LAYERS)


def vocab_size(model: PreTrainedModel) -> int:
    """Return how many token ids a model knows. A matrix that is kept in blocks is not unpacked for it."""
    embeddings: Any = model.get_input_embeddings()
    found = getattr(embeddings, "num_embeddings", None)
    return len(embeddings.weight) if found is None else found


def context_positions(model: PreTrainedModel) -> int | None:
    """Return how many positions the model was made for; None where its config does not say.

    Dynamic NTK scaling begins beyond `max_position_embeddings`, and is made for `factor` times as many.
    """
    config = model.config.get_text_config(decoder=True)
    found = getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int) or found <= 0:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(each for each in rope.values() if isinstance(each, dict))]  # of the model, or of types of layers
    return max(int(found * each.get("factor", 1)) if each.get("rope_type") == "dynamic" else found for each in ropes)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[int, ...]:
    """Return the tokens at which an answer ends: those of the generation settings, then the tokenizer's own.

    Chat models often name their end of turn only in the tokenizer.

    Raises:
        ConfigError: the generation settings name something else than tokens.
    """
    found: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = found.tolist() if isinstance(found, torch.Tensor) else found
    tokens = list(found) if isinstance(found, (list, tuple)) else [] if found is None else [found]
    if any(not isinstance(token, int) or abs(token) >= 1 << 63 for token in tokens):
        raise ConfigError(
            f"eos_token_id is {found!r:.80} in the checkpoint's generation_config.json; it must be a token's id, or a "
            "list of them. Correct it, or download the file again."
        )
    own = None if tokenizer is None else tokenizer.eos_token_id
    return tuple(tokens if own is None or own in tokens else [*tokens, own])


def stop_strings(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the texts at which the generation settings end an answer.

    Raises:
        ConfigError: they hold something else.
    """
    found = getattr(getattr(model, "generation_config", None), "stop_strings", None)
    if found is None:
        return ()
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(
            f"stop_strings is {found!r} in the model's generation settings (generation_config.json): it must be a text "
            "or a list of texts, none of them empty."
        )
    return tuple(texts)


def sampling_settings(model: PreTrainedModel) -> dict[str, Any]:
    """Return do_sample and the sampling that the checkpoint asks for, under the names of `generate`.

    What its generation settings leave open is transformers' default.
    """
    found = {name: getattr(model.generation_config, name, None) for name in _SAMPLING_DEFAULTS}
    return {name: _SAMPLING_DEFAULTS[name] if value is None else value for name, value in found.items()}


def other_settings(model: PreTrainedModel) -> list[str]:
    """Return the generation settings of a checkpoint that change answers and that only `generate` knows.

    `SamplingParams` has none for them: suppressed tokens, a least length, forced tokens and such.
    """
    settings = model.generation_config
    neutral = type(settings)().to_dict() | getattr(settings, "_get_default_generation_params", dict)()
    found = settings.to_dict()  # with fields of the checkpoint's own, which generate does not know
    given = {name: found[name] for name in neutral.keys() & found.keys() - _NOT_OF_TOKENS if found[name] is not None}
    return sorted(name for name, value in given.items() if value not in (neutral[name], [], {}) and value is not False)


def new_cache() -> Cache:
    """Return an empty key-value cache that keeps all positions of every layer, so that it can be cut anywhere."""
    return DynamicCache()


def cache_argument(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """Return a key-value cache under the name that the model's forward has for it."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


@contextmanager
def last_hidden_states(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collect what each pass in this context makes for the head: [B, P, H], normed, of all its tokens."""
    seen: list[torch.Tensor] = []
    hook = model.get_decoder().register_forward_hook(lambda _, args, made: seen.append(made.last_hidden_state))
    try:
        yield seen
    finally:
        hook.remove()


def packed_forward(
    model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: Cache, keep: torch.Tensor
) -> torch.Tensor:
    """Run one pass and return the logits [len(keep), V] of the tokens at these places.

    Args:
        input_ids: [1, N].
        position_ids: [1, N].
        cache: the key-value cache.
        keep: [S], places in 0..N-1.
    """
    known = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = cache_argument(model, cache)
    if "logits_to_keep" in known:
        arguments["logits_to_keep"] = keep
    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=True, **arguments).logits[0]
    return logits if "logits_to_keep" in known else logits[keep]
