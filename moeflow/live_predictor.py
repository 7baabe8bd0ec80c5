"""Which predictor a loaded model gets: by name, from a file, or whatever fits."""

from pathlib import Path

from moeflow.errors import ConfigError
from moeflow.layers import LayerSource
from moeflow.predictors.protocol import Predictor
from moeflow.residual import build_lookahead

NAMES = ("lookahead",)


def build_predictor(
    wanted: str | Path | None, model, layers: list[LayerSource], num_experts_per_tok: int
) -> Predictor | None:
    """Build the predictor that load_moe was asked for.

    Raises:
        ConfigError: unknown name.
        PredictorError: a file of another model, or not a predictor's.
    """
    if wanted is None:
        return None
    if wanted in ("auto", "lookahead"):
        lookahead = build_lookahead(model, num_experts_per_tok)
        if lookahead is None and wanted == "lookahead":
            raise ConfigError(
                "predictor='lookahead' needs routers that are one matrix behind a norm, and this model has none such."
            )
        return lookahead
    raise ConfigError(f"predictor={str(wanted)!r} is unknown. Allowed: auto, {', '.join(NAMES)}, a file, or None.")
