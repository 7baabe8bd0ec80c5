"""Training shared by all kinds of predictors: options, the split for early stopping, and the loop."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from moeflow.errors import ConfigError
from moeflow.predictors.routes import Routes

STOPPING_EVERY = 10  # one of so many training sequences decides when to stop
_WARM_UP_UPDATES = 50
_PATIENCE_EPOCHS = 2  # without improvement

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class TrainingOptions:
    """How long and where to train.

    Args:
        seed: of weights, order and dropout.
        epochs: at most; training stops earlier when the stopping split no longer improves.
        device: "auto" (CUDA where present), "cpu", "cuda" or "cuda:N".
        learning_rate: the highest; it rises for some updates and falls to zero along a cosine.
        batch_size: sequences.
    """

    seed: int = 0
    epochs: int = 8
    device: str = "auto"
    learning_rate: float = 2e-3
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"epochs is {self.epochs}. Allowed: 1 or more.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}. Allowed: 0 to 2^63 - 1.")

    @property
    def torch_device(self) -> torch.device:
        """The device to train on.

        Raises:
            ConfigError: there is no such device here.
        """
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        try:
            torch.zeros(1, device=name)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device {self.device!r} is not here. Allowed: auto, cpu, or a CUDA device.") from error
        return torch.device(name)


def stopping_split(routes: Routes) -> tuple[Routes, Routes]:
    """Split training sequences into those to learn from and every tenth, which decides when to stop.

    Raises:
        ConfigError: fewer than two sequences.
    """
    if len(routes) < 2:
        raise ConfigError(f"{len(routes)} sequence(s) to train on. Allowed: 2 or more; record more prompts.")
    step = min(STOPPING_EVERY, len(routes))
    stopping = range(step - 1, len(routes), step)
    return routes.select([s for s in range(len(routes)) if s not in stopping]), routes.select(stopping)


def length_batches(lengths: list[int], batch_size: int, rng: np.random.Generator) -> list[list[int]]:
    """Return batches of sequence numbers of about equal lengths, in random order."""
    order = np.argsort(np.array(lengths) * rng.uniform(0.8, 1.25, len(lengths)))
    batches = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return batches


def fit(
    module: torch.nn.Module,
    parameters: Iterable[torch.nn.Parameter],
    epoch_losses: Callable[[np.random.Generator], Iterable[torch.Tensor]],
    stopping_loss: Callable[[], float],
    options: TrainingOptions,
    *,
    epochs: int,
    updates_per_epoch: int,
    progress: Progress | None = None,
    title: str = "training",
) -> None:
    """Train until the stopping loss no longer improves; the module ends with the weights of its best epoch.

    Args:
        module: put into training and evaluation mode as needed.
        parameters: those that are trained.
        epoch_losses: yields one loss an update, given a generator for the order.
        stopping_loss: of the stopping split.
        options: seed, learning rate.
        epochs: at most.
        updates_per_epoch: about how many losses an epoch yields.
        progress: called with the share done, 0 to 1, and the title.
        title: of the training.
    """
    parameters, rng = list(parameters), np.random.default_rng(options.seed)
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    total, update = epochs * updates_per_epoch, 0
    best, best_state, since = stopping_loss(), copy.deepcopy(module.state_dict()), 0
    for epoch in range(epochs):
        module.train()
        for loss in epoch_losses(rng):
            share = min(update / total, 1.0)
            warm = min(1.0, (update + 1) / _WARM_UP_UPDATES)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * share))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            update += 1
            if progress is not None:
                progress(min(update / total, 1.0), f"{title}, epoch {epoch + 1} of {epochs}, best loss {best:.4f}")
        module.eval()
        stopping = stopping_loss()
        since = 0 if stopping < best else since + 1
        if stopping < best:
            best, best_state = stopping, copy.deepcopy(module.state_dict())
        if since == _PATIENCE_EPOCHS:
            break
    module.load_state_dict(best_state)
    module.eval()
    if progress is not None:
        progress(1.0, f"{title}, best loss {best:.4f}")
