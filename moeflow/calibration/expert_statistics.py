"""Calibration figures of every expert: its use, the error of its output in each format, the sensitivity of its layer.

The cost of storing expert e of layer l in format j is an estimate of how far it moves the model's predictions, in nats:

    cost[l, e, j] = sensitivity[l] * use[l, e] * error[l, e, j]

`error` is the mean over the tokens routed to the expert of |w_t (f_j(x_t) - f(x_t))|^2 / |h_t|^2: the error of its
output, weighted by the router, against the residual stream behind the block, whose length the next norm divides by.
`use` is the share of tokens that reach the expert, `sensitivity` the divergence KL(model || model with that layer
quantised) over that layer's relative error. All three are measured on some text and are to hold for other text, so each
is drawn towards what is typical: use towards an even share, the error of an expert with few tokens towards its layer's,
the sensitivity of a layer towards all layers' as far as the probed windows disagree on it.

Knows numbers and one file. Knows nothing of models or tensors.
"""

import json
import zlib
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from moeflow.atomic_file import atomic_file
from moeflow.errors import ConfigError

_VERSION = 1
_EVEN_SHARE = 0.5  # of the tokens of other text, assumed to be routed evenly
_PRIOR_TOKENS = 32  # an expert with fewer takes its layer's error more than its own
_TINY = 1e-12
# What numpy, zipfile and json raise for a damaged archive.
_DAMAGES = (ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError, BadZipFile, zlib.error)


class ExpertStatistics(NamedTuple):
    """Calibration figures of L layers, E experts at most in a layer, B formats.

    Args:
        formats: [B], names of the formats, from the smallest to the largest.
        num_experts: [L], experts of each layer; what lies beyond in the arrays is 0.
        num_bytes: [L, B], bytes of one expert's matrices with scales and zeros.
        num_tokens: tokens of the text.
        routed: [L, E], tokens that came to the expert.
        mean_weight: [L, E], the router's mean weight for them.
        error: [L, E, B], mean squared relative error of the output over them.
        divergence: [L, P], nats a token on each of P windows: KL(model || model with that layer's experts in one of the
            formats).
        disturbance: [L, P], that layer's mean squared relative error there.
    """

    formats: tuple[str, ...]
    num_experts: tuple[int, ...]
    num_bytes: np.ndarray
    num_tokens: int
    routed: np.ndarray
    mean_weight: np.ndarray
    error: np.ndarray
    divergence: np.ndarray
    disturbance: np.ndarray

    @property
    def exists(self) -> np.ndarray:
        """[L, E], whether a place of the arrays is an expert."""
        return np.arange(self.routed.shape[1]) < np.array(self.num_experts)[:, None]

    def costs(self) -> np.ndarray:
        """Return [L, E, B] estimated nats a token; 0 where there is no expert."""
        routed = self.routed[..., None].astype(np.float64)
        each_token = routed.sum(1, keepdims=True)
        layer_error = (routed * self.error).sum(1, keepdims=True) / np.maximum(each_token, 1)
        error = (routed * self.error + _PRIOR_TOKENS * layer_error) / (routed + _PRIOR_TOKENS)
        even = each_token / np.array(self.num_experts)[:, None, None]
        use = ((1 - _EVEN_SHARE) * routed + _EVEN_SHARE * even) / self.num_tokens
        return np.where(self.exists[..., None], self.sensitivity[:, None, None] * use * error, 0.0)

    @property
    def sensitivity(self) -> np.ndarray:
        """[L], nats of divergence a token for one unit of a layer's squared relative error.

        Logarithms of layers are drawn to their mean by the share of their variance that windows' disagreement explains
        (the positive-part James-Stein estimate).
        """
        logs = np.log(np.maximum(self.divergence, _TINY) / np.maximum(self.disturbance, _TINY))
        layers, typical = logs.mean(1), logs.mean()
        count, kept = logs.shape[1], 1.0
        if count > 1 and len(logs) > 1:
            noise = (logs - logs.mean(0) - layers[:, None] + typical).var() * count / (count - 1) / count
            kept = max(0.0, 1.0 - noise / max(layers.var(ddof=1), _TINY))
        return np.exp(typical + kept * (layers - typical))

    def expert_bytes(self) -> np.ndarray:
        """Return [L, E, B] bytes; 0 where there is no expert."""
        return np.where(self.exists[..., None], self.num_bytes[:, None, :], 0)

    def save(self, file: str | Path) -> None:
        """Write the file whole (numpy's npz, with a JSON text `about`)."""
        about = {"version": _VERSION, "formats": self.formats, "num_experts": self.num_experts}
        about["num_tokens"] = self.num_tokens
        with atomic_file(file, ConfigError) as partial, open(partial, "wb") as out:
            np.savez(out, about=np.array(json.dumps(about)), **{name: getattr(self, name) for name in _ARRAYS})

    @classmethod
    def load(cls, file: str | Path) -> "ExpertStatistics":
        """Read a file that `save` wrote.

        Raises:
            ConfigError: the file is missing, no such file, or of another version.
        """
        try:
            with np.load(file, allow_pickle=False) as stored:
                about = json.loads(str(stored["about"]))
                arrays = {name: stored[name] for name in _ARRAYS}
            version = about["version"]
            found = cls(tuple(about["formats"]), tuple(about["num_experts"]), num_tokens=about["num_tokens"], **arrays)
            _check_shapes(found)
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror or error}. Give a statistics file.") from error
        except _DAMAGES as error:
            raise ConfigError(f"{file} holds no calibration statistics ({error}). Measure them again.") from None
        if version != _VERSION:
            raise ConfigError(f"{file} is version {version}, this moeflow reads {_VERSION}. Measure them again.")
        return found


def _check_shapes(statistics: ExpertStatistics) -> None:
    """Refuse arrays of other sizes than the layers, experts and formats; ValueError names one."""
    layers, most, formats = len(statistics.num_experts), max(statistics.num_experts), len(statistics.formats)
    shapes = {
        "num_bytes": (layers, formats),
        "routed": (layers, most),
        "mean_weight": (layers, most),
        "error": (layers, most, formats),
    }
    for name, shape in shapes.items():
        if getattr(statistics, name).shape != shape:
            raise ValueError(f"{name} is {getattr(statistics, name).shape} and should be {shape}")


_ARRAYS = ("num_bytes", "routed", "mean_weight", "error", "divergence", "disturbance")
