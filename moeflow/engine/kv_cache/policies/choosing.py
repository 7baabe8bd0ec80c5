"""Which policy an engine has, and the layouts in which it can act."""

from typing import Any, NamedTuple

from moeflow.engine.kv_cache.layer_shape import LayerShape
from moeflow.engine.kv_cache.policies.heavy_hitters import HeavyHitters
from moeflow.engine.kv_cache.policies.pages import Pages
from moeflow.engine.kv_cache.policies.protocol import KeyValuePolicy
from moeflow.engine.kv_cache.policies.sinks import Sinks
from moeflow.errors import ConfigError
from moeflow.policy.key_value_policies import (
    HeavyHittersOptions,
    KeyValuePolicyOption,
    PagesOptions,
    SinksOptions,
    kv_policy_options,
)

_OFF = {
    "native_steps": "a policy acts in the model's own attention",
    "speculation": "drafts would be judged by what a policy lets go",
}
_FORGETTING = {"share_prefixes": "what a sequence has forgotten, another one would miss"}


class AttentionFacts(NamedTuple):
    """What is known of a model's attention once a token has run.

    Args:
        keeps_latents: whether keys and values are made anew of something else.
        other_rules: layers without a window in which queries do not see all positions before them.
        shares_keys: whether several layers attend to the keys of one.
        has_weights: whether an eager attention returns weights.
    """

    keeps_latents: bool
    other_rules: set[int]
    shares_keys: bool
    has_weights: bool


def policy_of(option: KeyValuePolicyOption, model: object) -> KeyValuePolicy | None:
    """Return a policy of one engine.

    Args:
        option: of `Engine`; "auto" is what the model was loaded with.
        model: which.

    Raises:
        ConfigError: there is no such policy, or a size is not allowed.
    """
    options = kv_policy_options(getattr(model, "_moeflow_kv_policy", None) if option == "auto" else option)
    if isinstance(options, SinksOptions):
        return Sinks(options)
    if isinstance(options, HeavyHittersOptions):
        return HeavyHitters(options)
    return Pages(options) if isinstance(options, PagesOptions) else None


def noted(policy: KeyValuePolicy, shapes: dict[int, LayerShape], facts: AttentionFacts) -> dict[int, LayerShape]:
    """Return the shapes of layers, with what a policy keeps beside those that have no window.

    Raises:
        ConfigError: the policy cannot act in this model, for the reason in the message.
    """
    why = None
    if facts.keeps_latents:
        why = "this model keeps latents, of which it makes keys and values"
    elif others := sorted(facts.other_rules & {layer for layer, shape in shapes.items() if not shape.window}):
        why = f"layer {others[0]} of this model has a mask of its own, neither causal nor a window"
    elif all(shape.window for shape in shapes.values()):
        why = "every layer of this model has a window already"
    elif policy.weighs and not facts.has_weights:
        why = "this model has no eager attention, which returns weights"
    elif policy.weighs and facts.shares_keys:
        why = "several layers of this model attend to the keys of one"
    if why is not None:
        raise ConfigError(f'kv_policy="{policy.name}" is not possible: {why}. Leave kv_policy=None.')
    return {
        layer: shape if shape.window else shape._replace(note=policy.note(shape)) for layer, shape in shapes.items()
    }


def policy_stats(policy: KeyValuePolicy | None) -> dict[str, Any] | None:
    """Return what `stats()["kv_policy"]` tells: name, sizes, the share of positions that queries saw, what is off."""
    if policy is None:
        return None
    off = {**_OFF, **(_FORGETTING if policy.forgets else {})}
    return {**policy.described(), "attended_share": policy.seen.share, "off": off}
