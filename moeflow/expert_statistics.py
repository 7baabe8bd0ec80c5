"""What calibration learnt of every expert: how often it is used, what each format does to its output, what it matters.

The cost of storing expert e of layer l in format j is an estimate of how far it moves the model's predictions, in nats:

    cost[l, e, j] = sensitivity[l] * (routed[l, e] * error[l, e, j] + mean error of layer l's tokens at j) / tokens

`error` is the mean over the tokens routed to the expert of |w_t (f_j(x_t) - f(x_t))|^2 / |h_t|^2: the error of its
output, weighted by the router, against the residual stream behind the block, whose length the next norm divides by.
`sensitivity` is the divergence KL(model || model with that layer quantised) over that layer's relative error. The last
term counts each expert as if one more token had come to it, so that one the text never reached is not free.

Knows numbers and one file. Knows nothing of models or tensors.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from moeflow.errors import ConfigError

_VERSION = 1


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
        sensitivity: [L], nats of divergence a token for one unit of a layer's squared relative error.
    """

    formats: tuple[str, ...]
    num_experts: tuple[int, ...]
    num_bytes: np.ndarray
    num_tokens: int
    routed: np.ndarray
    mean_weight: np.ndarray
    error: np.ndarray
    sensitivity: np.ndarray

    @property
    def exists(self) -> np.ndarray:
        """[L, E], which places of the arrays are experts."""
        return np.arange(self.routed.shape[1]) < np.array(self.num_experts)[:, None]

    def costs(self) -> np.ndarray:
        """Return [L, E, B] estimated nats a token; 0 where there is no expert."""
        routed = self.routed[..., None].astype(np.float64)
        layer_mean = (routed * self.error).sum(1, keepdims=True) / np.maximum(routed.sum(1, keepdims=True), 1)
        costs = self.sensitivity[:, None, None] * (routed * self.error + layer_mean) / self.num_tokens
        return np.where(self.exists[..., None], costs, 0.0)

    def expert_bytes(self) -> np.ndarray:
        """Return [L, E, B] bytes; 0 where there is no expert."""
        return np.where(self.exists[..., None], self.num_bytes[:, None, :], 0)

    def save(self, file: str | Path) -> None:
        """Write the file whole (numpy's npz, with a JSON text `about`)."""
        file = Path(file)
        about = {"version": _VERSION, "formats": self.formats, "num_experts": self.num_experts}
        about["num_tokens"] = self.num_tokens
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as out:
                np.savez(out, about=np.array(json.dumps(about)), **{name: getattr(self, name) for name in _ARRAYS})
            os.replace(partial, file)
        except OSError as error:
            raise ConfigError(
                f"{file} cannot be written: {error.strerror}. Give a file in a folder of yours."
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, file: str | Path) -> "ExpertStatistics":
        """Read what `save` wrote.

        Raises:
            ConfigError: the file is missing, no such file, or of another version.
        """
        try:
            with np.load(file, allow_pickle=False) as stored:
                about = json.loads(str(stored["about"]))
                arrays = {name: stored[name] for name in _ARRAYS}
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror or error}. Give a statistics file.") from error
        except (ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ConfigError(f"{file} holds no calibration statistics ({error}). Measure them again.") from None
        if about["version"] != _VERSION:
            raise ConfigError(
                f"{file} is version {about['version']}, this moeflow reads {_VERSION}. Measure them again."
            )
        return cls(
            formats=tuple(about["formats"]),
            num_experts=tuple(about["num_experts"]),
            num_tokens=about["num_tokens"],
            **arrays,
        )


_ARRAYS = ("num_bytes", "routed", "mean_weight", "error", "sensitivity")
