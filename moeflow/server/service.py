"""The service behind the endpoints: whether a model is there, its prompts, and answers from its engine.

Knows the model's life (loading, ok, closed, failed), the worker and a thread for the tokenizer. Knows nothing of paths
or forms.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar, cast

from moeflow.errors import ConfigError
from moeflow.server.answers import Answers
from moeflow.server.metrics import Metrics
from moeflow.server.settings import ServerSettings
from moeflow.server.wire.errors import RETRY_S, HttpError
from moeflow.server.worker import Asked, Worker

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moeflow.offload.runtime import ExpertRuntime
    from moeflow.server.served_model import ServedModel

_Result = TypeVar("_Result")
_READING_S = 5e-4  # from look to look at what is being read
_QUIET_TURNS = 8  # of the event loop: from a request in a socket to its tokenizing, and from there to the engine


class Service:
    """One model behind HTTP, from before it is loaded until it is closed.

    Args:
        settings: the server's.

    Attributes:
        settings: the same.
        metrics: counts answers.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.metrics = Metrics(lambda: self.figures)
        self._stage = "nothing is loaded yet"
        self._begin_s = time.perf_counter()
        self._closed = False
        self._model: ServedModel | None = None
        self._runtime: ExpertRuntime | None = None
        self._worker: Worker | None = None
        self._being_read: set[object] = set()
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moeflow-tokenizer")

    def open(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        processor: Any = None,
        no_processor: str = "it is served without a processor of images",
    ) -> None:
        """Begin to answer.

        Args:
            model: of `load_moe`, or any transformers causal LM that an engine takes.
            tokenizer: the model's.
            processor: the model's, of images and with the tokenizer; None for text alone.
            no_processor: why there is none.

        Raises:
            MoeflowError: no engine takes the model.
        """
        from moeflow.engine.serial.choose_engine import engine_for, engine_with_images_for
        from moeflow.hf.vision.processors import why_no_images
        from moeflow.server.served_model import ServedModel

        settings = self.settings
        no_images = no_processor if processor is None else why_no_images(model, processor)
        engine = (engine_for if no_images else engine_with_images_for)(
            model,
            tokenizer,
            max_batch_size=settings.max_batch_size,
            max_step_tokens=settings.step_tokens,
            kv_memory=settings.kv_memory,
            kept_folder=settings.kept_folder,
            kept_disk=settings.kept_disk,
        )
        if settings.kv_disk is not None:
            engine.load_kept(settings.kv_disk)
        served = ServedModel(model, tokenizer, settings, engine.stats()["kv_positions"], processor, no_images)
        self._runtime = cast("ExpertRuntime | None", getattr(model, "moeflow", None))
        self._worker = Worker(engine, lambda: self._look(engine.stats), self._when_read, settings.kv_disk)
        self._model = served

    def tell(self, stage: str) -> None:
        """Say what is being done until the model is there."""
        self._stage = stage

    @property
    def progress(self) -> str:
        """How far loading is."""
        return f"{self._stage}, {time.perf_counter() - self._begin_s:.0f} seconds so far"

    @property
    def num_under_way(self) -> int:
        """Answers that run or wait."""
        return 0 if self._worker is None else self._worker.num_under_way

    @property
    def status(self) -> str:
        """ "loading", "ok", "closed" or "failed"."""
        refusal = self.unavailable()
        if refusal is None:
            return "ok"
        return "closed" if refusal.code == "stopping" else str(refusal.code)

    def unavailable(self) -> HttpError | None:
        """Return why nothing can be answered; None where it can."""
        if self._closed or (self._runtime is not None and self._runtime.closed):
            return HttpError(503, "the model is closed.", code="closed")
        if self._worker is None:
            retry = {"retry-after": RETRY_S}
            return HttpError(503, f"the model is loading: {self.progress}.", code="loading", headers=retry)
        return self._worker.refusal

    @property
    def model(self) -> ServedModel:
        """What endpoints ask about the model.

        Raises:
            HttpError: there is none.
        """
        if self._model is None:
            raise self.unavailable() or HttpError(503, "there is no model.", code="failed")
        return self._model

    @property
    def figures(self) -> dict[str, Any] | None:
        """The newest figures: "engine", "model" (None without experts on disk), "resident" [layers, experts]."""
        return None if self._worker is None else self._worker.figures

    async def read(self, call: Callable[[], _Result]) -> _Result:
        """Run work of the tokenizer in its thread.

        Raises:
            HttpError: 400, the request is wrong.
        """
        read = object()
        self._being_read.add(read)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, call)
        except ConfigError as error:
            raise HttpError(400, str(error)) from None
        finally:
            self._being_read.discard(read)

    def _when_read(self, tell: Callable[[], None], until_s: float, quiet_turns: int = 0) -> None:
        """Tell, in the event loop, when it has submitted the requests that it has already received; not after a time.

        Callbacks, and no task: a loop that ends drops them.
        """
        loop = asyncio.get_running_loop()
        if self._being_read:
            if time.perf_counter() < until_s:
                loop.call_later(_READING_S, self._when_read, tell, until_s)
        elif quiet_turns < _QUIET_TURNS:
            loop.call_soon(self._when_read, tell, until_s, quiet_turns + 1)
        else:
            tell()

    def submit(self, asked: list[Asked]) -> Answers:
        """Have requests answered.

        Raises:
            HttpError: 429, too many wait; 503, nothing is answered any more.
        """
        unavailable = self.unavailable()
        if unavailable is not None:
            raise unavailable
        worker = self._worker
        assert worker is not None, "it is available"
        most = self.settings.max_under_way
        if worker.num_under_way + len(asked) > most:
            if len(asked) > most:
                raise HttpError(400, f"it asks for {len(asked):,} answers; this server holds {most:,} at once.")
            raise HttpError(
                429,
                f"{worker.num_under_way:,} requests are under way; this server holds {most:,}. Try again later.",
                code="too_many_requests",
                headers={"retry-after": RETRY_S},
            )
        ids: list[str] = []
        answers = Answers(
            len(asked),
            lambda left: worker.cancel([ids[index] for index in left]),
            most_unread=self.settings.max_unread,
            watcher=self.metrics,
        )
        ids += worker.submit(asked, answers)
        return answers

    def drain(self, grace_s: float) -> bool:
        """Refuse new requests, let those under way finish, end the rest; return whether all finished in time."""
        return self._worker is None or self._worker.drain(grace_s)

    def close(self) -> None:
        """End what is under way and release the engine; the model stays."""
        if self._worker is not None:
            self._worker.close()
        self._closed = True
        self._tokenizing.shutdown()

    def _look(self, engine_stats: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Take the figures, in the worker's thread."""
        runtime = self._runtime
        if runtime is None:
            return {"engine": engine_stats(), "model": None, "resident": None}
        counts = runtime.experts_per_layer
        resident = runtime.cache.present(len(counts), max(counts)).copy()
        return {"engine": engine_stats(), "model": runtime.stats(), "resident": resident}

    def resident_rows(self) -> list[list[int]]:
        """Return which experts are resident: a row of 0 and 1 for each layer; none without experts on disk."""
        figures = self.figures
        if figures is None or figures["resident"] is None or self._runtime is None:
            return []
        rows = zip(figures["resident"], self._runtime.experts_per_layer, strict=True)
        return [row[:count].astype(int).tolist() for row, count in rows]
