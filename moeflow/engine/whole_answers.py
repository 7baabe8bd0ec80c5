"""Whole answers: requests that are added, stepped to their ends and taken out of an engine by one caller.

Knows requests' outputs. Knows nothing of how a step is made.
"""

from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Sequential
from contextlib import closing

from moeflow.engine.request import Completion, Outputs, StepOutput
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ConfigError, MoeflowError
from moeflow.turns import Turns, in_turn


class WholeAnswers:
    """Runs requests to their ends; steps in other threads may compute them meanwhile.

    Args:
        outputs: where those of steps come.
        turns: of the engine.
        new_id: returns an id that is free.
        add: queues a request: (prompt, params, id=).
        run_step: runs a step.
        cancel: ends the request of an id, where it is under way.
    """

    def __init__(
        self,
        outputs: Outputs,
        turns: Turns,
        new_id: Callable[[], str],
        add: Callable[..., object],
        run_step: Callable[[], None],
        cancel: Callable[[str], object],
    ) -> None:
        self._outputs = outputs
        self._turns = turns
        self._new_id, self._add, self._run_step, self._cancel = new_id, add, run_step, cancel

    def generate(
        self, prompts: Sequential[str | list[int]], params: SamplingParams | Sequential[SamplingParams]
    ) -> list[Completion]:
        """Run prompts to their ends and return their completions in the same order."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ConfigError(f"{len(each)} params for {len(prompts)} prompts: give one, or one for each.")
        ids, completions = [], {}
        try:
            for prompt, one in zip(prompts, each, strict=True):
                ids.append(self._claim())
                self._add(prompt, one, id=ids[-1])
            for output in self._until(ids):
                if output.completion is not None:
                    completions[output.id] = output.completion
        finally:
            self._forget(ids)
        return [completions[id] for id in ids]

    def stream(self, prompt: str | list[int], params: SamplingParams) -> Iterator[str]:
        """Run one request and yield its text as it comes."""
        with closing(self.outputs(prompt, params)) as outputs:
            for output in outputs:
                if output.text:
                    yield output.text
                if output.completion is not None and output.completion.finish_reason == "error":
                    raise MoeflowError(output.completion.error)

    def outputs(self, prompt: str | list[int], params: SamplingParams) -> Generator[StepOutput]:
        """Run one request and yield its outputs as they come."""
        id = self._claim()
        try:
            self._add(prompt, params, id=id)
            yield from self._until([id])
        finally:
            self._forget([id])

    @in_turn
    def _claim(self) -> str:
        """Return the id of a request to come, whose outputs step() will not return."""
        id = self._new_id()
        self._outputs.claim(id)
        return id

    def _until(self, ids: list[str]) -> Iterator[StepOutput]:
        """Step until these requests have ended, and yield their outputs."""
        left = set(ids)
        while left:
            for output in self._next_outputs(ids):
                if output.completion is not None:
                    left.discard(output.id)
                yield output

    @in_turn
    def _next_outputs(self, ids: list[str]) -> list[StepOutput]:
        """Return the outputs of these requests; where there are none, run a step first."""
        found = self._outputs.take(ids)
        if found:
            return found
        self._run_step()
        return self._outputs.take(ids)

    @in_turn
    def _forget(self, ids: list[str]) -> None:
        """Cancel those of these requests that are under way, and report none of them."""
        for id in ids:
            self._cancel(id)
            self._outputs.drop(id)
