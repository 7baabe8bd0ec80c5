"""Chooses a loaded model's predictor: by name, from a file, or one that fits.

Knows predictors and routers. Knows nothing of prefetching.
"""

from pathlib import Path

from transformers import PreTrainedModel

from moeflow.checkpoint.layer_source import LayerSource
from moeflow.errors import ConfigError
from moeflow.hf.fingerprint import model_fingerprint
from moeflow.hf.passes.residual import build_lookahead
from moeflow.predictors.ensemble import Ensemble
from moeflow.predictors.files import load_predictor
from moeflow.predictors.markov import Markov
from moeflow.predictors.popularity import Popularity
from moeflow.predictors.protocol import Predictor

NAMES = ("lookahead", "markov", "popularity", "ensemble")


def build_predictor(
    wanted: str | Path | None, model: PreTrainedModel, layers: list[LayerSource], num_experts_per_tok: int
) -> Predictor | None:
    """Build the predictor that load_moe's option names.

    "auto" asks the coming layers' own routers (lookahead) where they are a matrix behind a norm, and otherwise counts
    which experts follow which (markov). "ensemble" weighs the two against each other while the model runs.

    Args:
        wanted: "auto", a name, a predictor's file, or None.
        model: its experts taken off.
        layers: its MoE layers.
        num_experts_per_tok: K.

    Raises:
        ConfigError: no such name or file, or lookahead for routers that cannot be asked.
        PredictorError: a file of another model, or no predictor's.
    """
    if wanted is None:
        return None
    sizes = len(layers), max(source.layout.num_experts for source in layers)
    if wanted in ("auto", "lookahead", "ensemble"):
        lookahead = build_lookahead(model, num_experts_per_tok) if len(layers) > 1 else None
        if lookahead is None and wanted == "lookahead":
            raise ConfigError(
                "predictor='lookahead' needs at least two MoE layers whose routers are one matrix behind a norm, and "
                "this model has none such. Use 'markov', a trained file, or 'auto'."
            )
        if wanted == "ensemble":
            return Ensemble([*([] if lookahead is None else [lookahead]), Markov(*sizes), Popularity(*sizes)])
        return lookahead or Markov(*sizes)
    if wanted == "markov":
        return Markov(*sizes)
    if wanted == "popularity":
        return Popularity(*sizes)
    if not Path(wanted).is_file():
        raise ConfigError(
            f"predictor={str(wanted)!r} is neither a file nor a name. Allowed: auto, {', '.join(NAMES)}, a file "
            "written by moeflow predictor train, or None."
        )
    predictor, _ = load_predictor(
        wanted, fingerprint=model_fingerprint(model), num_layers=sizes[0], num_experts=sizes[1]
    )
    return predictor
