"""Varlen attention: one forward pass over new tokens of several sequences, packed without padding.

Everything in a model but attention treats each token alone, so that only attention must know which tokens are whose:
the functions here stand where transformers looks up an attention function and a mask function, cut the pass into its
segments, and call the model's own attention for each with the whole keys and values of its sequence.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from moeflow.engine.kv_cache.kv_format import KeyValueFormat, check_features
from moeflow.engine.kv_cache.layer_shape import LayerShape
from moeflow.engine.kv_cache.policies.choosing import AttentionFacts, noted
from moeflow.engine.kv_cache.policies.model_attention import attend_all, has_weights, model_attention
from moeflow.engine.kv_cache.policies.protocol import KeyValuePolicy, SegmentAttention
from moeflow.engine.kv_cache.segment_masks import SegmentMasks
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.errors import ConfigError, ExpertReadError, GpuError, UnsupportedModelError
from moeflow.hf.passes import attention, forward
from moeflow.hf.passes.attention import MaskRule
from moeflow.hf.passes.rotary import SequenceRotaries, Span

_UNUSED_TENSORS = {"position_ids", "cache_position"}  # attention functions get them and do not use them
_PER_HEAD_TENSORS = {"s_aux"}  # the same for every token
_MAX_TRIED_TOKENS = 8  # token ids tried in turn where experts of the first ones cannot be read


class Segment(NamedTuple):
    """The new tokens of one sequence in a pass.

    Args:
        slot: where its keys and values lie; None in a pass that keeps none.
        start: the position of its first new token.
        num_new: new tokens.
        length: positions of the call in which `generate` would compute these: a prompt in pieces counts whole.
    """

    slot: KeyValueSlot | None
    start: int
    num_new: int
    length: int

    @property
    def end(self) -> int:
        """Positions it has after the pass."""
        return self.start + self.num_new


class VarlenCache(forward.KeyValueCache):
    """What a packed pass hands to the model as its key-value cache.

    Attributes:
        shapes: of each layer that keeps keys and values.
        shares_passes: whether sequences may be in one pass; a model that asks for the length of its cache takes one
            length for all.
        rotaries: the rotary embeddings that scale by the length; there once the model is learnt.
    """

    rotaries: SequenceRotaries
    may_run_again = True  # a pass writes where its tokens belong and counts nothing: `restore_point` has nothing to do

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shares_passes = True
        self.segments: list[Segment] = []
        self.shapes: dict[int, LayerShape] = {}  # of each layer that keeps keys and values, learnt as passes run
        self.num_attentions = 0
        self._latent: set[int] = set()  # layers that make keys and values anew of what is kept
        self._returned: dict[
            int, tuple[int, torch.Tensor, torch.Tensor]
        ] = {}  # {id of keys: (layer, keys, values)} of this pass
        self._last_layer = 0
        self._windows: dict[int, set[int]] = {}  # of each layer, most positions that one sees where it is read, or 0
        self._policy: KeyValuePolicy | None = None
        self._other_rules: set[int] = set()  # layers whose mask is neither causal nor a window or chunk
        self._has_weights = True
        self._implementations: dict[int, str] = {}
        self._rows: list[weakref.ref[KeyValueSlot]] = []  # the slots of this pass, or of the one before
        self._same_rows = False  # whether this pass goes on with the sequences of the one before

    @contextmanager
    def running(self, model: PreTrainedModel, segments: list[Segment]) -> Iterator[None]:
        """Let the model's passes meanwhile be packed ones over these segments."""
        self.segments = segments
        self._same_rows = self.goes_on(segments)
        self.follow(segments)
        try:
            spans = [Span(segment.num_new, segment.length) for segment in segments]
            with attention.attention_replaced(model, self) as self._implementations, self.rotaries.running(spans):
                yield
        finally:
            self._returned.clear()
            self.segments = []

    def goes_on(self, segments: list[Segment]) -> bool:
        """Whether a pass over these segments goes on with the sequences of the one before, row by row."""
        return self._rows == [weakref.ref(segment.slot) for segment in segments if segment.slot is not None]

    def follow(self, segments: list[Segment]) -> None:
        """Note that a pass over these segments is the one before the next."""
        self._rows = [weakref.ref(segment.slot) for segment in segments if segment.slot is not None]

    def learn(self, model: PreTrainedModel) -> None:
        """Run one token, to learn what the model keeps of a position and whether its attention can be cut.

        Raises:
            UnsupportedModelError: it cannot, for the reason in the message.
            ExpertReadError: nor can any of a few other tokens be run, since experts cannot be read.
        """
        name = type(model).__name__
        self.rotaries = SequenceRotaries(model, forward.context_positions(model))
        try:
            for token in range(_MAX_TRIED_TOKENS):
                try:
                    self._run_alone(model, token)
                    break
                except ExpertReadError:
                    if token == _MAX_TRIED_TOKENS - 1:
                        raise
        except GpuError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise UnsupportedModelError(
                f"{name} cannot run a pass of one token alone ({type(error).__name__}: {error}): the engine gives it "
                "token ids, positions and a cache only. Call model.generate instead."
            ) from error
        finally:
            self.rotaries.keep_dependent()
        if not self.shapes or self.num_attentions < len(self.shapes):
            raise UnsupportedModelError(
                f"{name} does not call transformers' attention interface in each layer that keeps keys and values "
                f"({self.num_attentions} calls, {len(self.shapes)} layers). Call model.generate instead."
            )
        context = forward.context_positions(model)
        for layer, seen in self._windows.items():
            if 0 not in seen and layer not in self._latent and (context is None or max(seen) < context):
                self.shapes[layer] = self.shapes[layer]._replace(window=max(seen))

    def shapes_in(self, form: KeyValueFormat) -> dict[int, LayerShape]:
        """Return the shapes of the layers of a learnt model, kept in a format.

        Raises:
            ConfigError: a layer keeps what the format cannot hold.
        """
        if self._latent:
            raise ConfigError(
                f'kv_format="{form.name}" is not possible: this model keeps latents, of which it makes keys and '
                'values. Leave kv_format="auto".'
            )
        for shape in self.shapes.values():
            for _, features in (shape.key, shape.value):
                check_features(form, features)
        return {layer: shape._replace(form=form) for layer, shape in self.shapes.items()}

    def obey(self, policy: KeyValuePolicy, shapes: dict[int, LayerShape]) -> dict[int, LayerShape]:
        """Let a policy attend in the layers of a learnt model that have no window; return shapes with its notes.

        Raises:
            ConfigError: it cannot act in this model.
        """
        shares_keys = self.num_attentions > len(self.shapes)
        facts = AttentionFacts(bool(self._latent), self._other_rules, shares_keys, self._has_weights)
        shapes = noted(policy, shapes, facts)
        self._policy = policy
        return shapes

    def _run_alone(self, model: PreTrainedModel, token: int) -> None:
        position = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self.num_attentions = 0
        with torch.no_grad(), self.running(model, [Segment(None, 0, 1, 1)]):
            forward.packed_forward(model, torch.full_like(position, token), position, self, position[0])

    def describe_pass(self, input_ids: torch.Tensor) -> tuple[int, int, bool, torch.Tensor | None]:
        """Tell num_sequences, num_positions, whether any decodes, and the tokens [num_sequences, num_positions].

        Only a pass of one token a sequence is a rectangle; any other is told as one row. The tokens are None where they
        do not go on with the sequences of the pass before, row by row.
        """
        decode = [segment.num_new == 1 and segment.start > 0 for segment in self.segments]
        if all(decode):
            return len(self.segments), 1, True, input_ids.reshape(-1, 1) if self._same_rows else None
        return 1, input_ids.shape[1], any(decode), None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep new keys and values, [1, heads, tokens, features]; what comes back goes to attention.

        Returns:
            Of a layer that hands it on as it is, the new ones: attention looks up the others where they lie. Of a
            latent layer, those of all positions of all sequences, one sequence behind the other.
        """
        if layer_idx not in self.shapes:
            key, value = ((tensor.shape[1], tensor.shape[3]) for tensor in (key_states, value_states))
            self.shapes[layer_idx] = LayerShape(key, value, key_states.dtype, key_states.device)
        counts = [segment.num_new for segment in self.segments]
        pieces = zip(key_states.split(counts, 2), value_states.split(counts, 2), strict=True)
        for segment, (keys, values) in zip(self.segments, pieces, strict=True):
            if segment.slot is not None:
                segment.slot.write(layer_idx, segment.start, keys, values)
        if layer_idx in self._latent and any(segment.start for segment in self.segments):
            keys, values = zip(*self._read(layer_idx), strict=True)
            return torch.cat(keys, 2), torch.cat(values, 2)
        self._last_layer = layer_idx
        self._returned[id(key_states)] = (layer_idx, key_states, value_states)
        return key_states, value_states

    def whole(self, key: torch.Tensor, value: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return each segment's keys and values of all positions, given what attention was called with.

        Raises:
            UnsupportedModelError: these are not of the tokens of this pass.
        """
        layer, keys, values = self._returned.get(id(key), (0, None, None))
        if keys is key and values is value:
            if self.segments[0].slot is not None:
                return self._read(layer)
        else:
            self._latent.add(self._last_layer)
        ends = [segment.end for segment in self.segments]
        if not key.shape[2] == value.shape[2] == sum(ends):
            raise UnsupportedModelError(
                f"attention was called with {key.shape[2]} keys where the sequences have {sum(ends)} positions: this "
                "model does more with its keys than the engine knows. Call model.generate instead."
            )
        return list(zip(key.split(ends, 2), value.split(ends, 2), strict=True))

    def _read(self, layer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the keys and values of all positions of each segment."""
        return [segment.slot.read(layer, segment.end) for segment in self.segments if segment.slot is not None]

    def implementation(self, module: torch.nn.Module) -> str:
        """Name the attention implementation that this module has outside of packed passes."""
        return self._implementations[id(module.config)]

    @property
    def is_compileable(self) -> bool:
        """Never: every pass has another shape."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the positions of the pass's one sequence; a model that asks gets no pass of several."""
        self.shares_passes = False
        return max(segment.start for segment in self.segments)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return what transformers hands to the mask function, which does not look at it."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return what transformers hands to the mask function, which does not look at it."""
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no most."""
        return -1

    def mask(
        self, batch_size: int, q_length: int, mask_function: MaskRule, device: torch.device | None
    ) -> torch.Tensor:
        """Return a tensor that models pass on, with the rule on it."""
        carrier = torch.ones(batch_size, 1, q_length, 1, dtype=torch.bool, device=device)
        carrier.rule = SegmentMasks(mask_function)  # type: ignore[attr-defined]  # models pass the tensor on with what is on it
        return carrier

    def attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend by the model's own attention, segment by segment.

        Raises:
            UnsupportedModelError: the model attends in a way that cannot be cut into sequences.
        """
        self.num_attentions += 1
        rule = getattr(attention_mask, "rule", None)
        unknown = [
            name
            for name, argument in kwargs.items()
            if isinstance(argument, torch.Tensor) and name not in _UNUSED_TENSORS | _PER_HEAD_TENSORS
        ]
        if rule is None or unknown:
            found = f"gives its attention {unknown[0]}" if unknown else "makes its attention masks itself"
            raise UnsupportedModelError(
                f"{type(module).__name__} {found}, which the engine cannot cut into sequences. Call model.generate "
                "instead."
            )
        if self.segments[0].slot is None:
            self._learn_window(key, rule)
            self._has_weights &= has_weights(module)
        implementation = self.implementation(module)
        outputs = []
        queries = query.split([segment.num_new for segment in self.segments], 2)
        kwargs = {name: argument for name, argument in kwargs.items() if name not in _UNUSED_TENSORS}
        layer = self._returned.get(id(key), (self._last_layer,))[0]
        own, weigh = model_attention(module, implementation, kwargs)
        for index, (segment, (keys, values)) in enumerate(zip(self.segments, self.whole(key, value), strict=True)):
            given = queries[index], keys, values
            mask = partial(rule.of, index, segment, query, implementation == "eager")
            exact = partial(attend_all, module, implementation, given, mask, kwargs)
            if self._policy is None or segment.slot is None or segment.slot.layout[layer].window:
                outputs.append(exact())
            else:
                call = SegmentAttention(layer, segment.slot, segment.start, *given, exact, own, weigh)
                outputs.append(self._policy.attend(call))
        return torch.cat(outputs, 1), None

    def _learn_window(self, key: torch.Tensor, mask: SegmentMasks) -> None:
        """Note how many positions one sees in the layer that keeps these keys; a chunk is a window of its length."""
        if id(key) in self._returned:
            layer = self._returned[id(key)][0]
            self._windows.setdefault(layer, set()).add(mask.most_seen)
            if not (mask.is_causal or mask.most_seen):
                self._other_rules.add(layer)
