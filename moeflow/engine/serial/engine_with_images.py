"""Engine with images: requests of text on one engine, and beside it those that show images on a serial one.

Knows both engines as wholes. Knows nothing of passes.
"""

from __future__ import annotations

from typing import Any

from moeflow.engine.engine import Engine
from moeflow.engine.request import StepOutput
from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.sequence import Images
from moeflow.engine.serial.serial_engine import SerialEngine

_OF_TEXTS = ("kv_position_bytes", "kv_positions")  # which a serial engine has not


class EngineWithImages:
    """Two engines on one model, which take turns step by step. Ids are the caller's, each of one request.

    Args:
        texts: runs requests without images; it is closed with this engine.
        images: runs those with images; it may be the same.
    """

    def __init__(self, texts: Engine, images: SerialEngine) -> None:
        self._texts, self._images = texts, images
        self._engines: list[Engine] = [texts] if texts is images else [texts, images]

    @property
    def finished(self) -> bool:
        """Whether every request has ended and been reported."""
        return all(engine.finished for engine in self._engines)

    def add(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        id: str,
        priority: int = 0,
        images: Images | None = None,
    ) -> str:
        """Queue a request and return its id, as `Engine.add` or `SerialEngine.add_with_images`."""
        if images is None:
            return self._texts.add(prompt, params, id=id, priority=priority)
        return self._images.add_with_images(prompt, images, params, id=id, priority=priority)

    def step(self) -> list[StepOutput]:
        """Run a step of the engine whose turn it is, if it has requests, else of the other; as `Engine.step`."""
        self._engines.append(self._engines.pop(0))
        return next((engine for engine in self._engines if not engine.finished), self._texts).step()

    def cancel(self, id: str) -> bool:
        """End a request with the tokens it has; return False where none of this id is under way."""
        return any(engine.cancel(id) for engine in self._engines)

    def stats(self) -> dict[str, Any]:
        """Return the engines' figures, added up; what only one of them has is that of texts."""
        texts = self._texts.stats()
        return texts if self._images is self._texts else _added(texts, self._images.stats())

    def save_kept(self, folder: str) -> int:
        """Write what is kept of texts, as `Engine.save_kept`."""
        return self._texts.save_kept(folder)

    def load_kept(self, folder: str) -> int:
        """Take up what is kept of texts, as `Engine.load_kept`."""
        return self._texts.load_kept(folder)

    def close(self) -> None:
        """Cancel what is under way and release its memory. The model stays."""
        for engine in self._engines:
            engine.close()


def _added(texts: dict[str, Any], images: dict[str, Any]) -> dict[str, Any]:
    added = dict(texts)
    for name, value in texts.items():
        if name == "speculation":  # answers about images have none
            continue
        if isinstance(value, dict) and isinstance(images[name], dict):
            added[name] = _added(value, images[name])
        elif isinstance(value, (int, float)) and name not in _OF_TEXTS:
            added[name] = value + images[name]
    return added
