"""A loaded engine in a process of its own that decodes when it is asked: one line of JSON in, one line out.

    python step_worker.py JOB

JOB is a job of engines.py with "threads" and "step" ("python" or "auto"; of moeflow). A request is a number of tokens;
the answer tells the seconds between tokens, and of a native step where they went.
"""

import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


class StepClock:
    """Where the seconds of native steps go, beside what the program counts itself.

    Args:
        runtime: of a model loaded with step="auto", its program captured.
    """

    def __init__(self, runtime) -> None:
        (self._runner,) = runtime.step.programs
        self._inner, self._run = self._runner.step, self._runner.bound.code.run
        self._runner.step, self._runner.bound.code.run = self._step, self._native
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.walls: list[float] = []
        self.calls, self._before = 0, dict(self._runner.seconds)

    def as_dict(self) -> dict:
        """Return seconds of a step: all, by kind of instruction, outside; and the library's calls of a step."""
        steps = max(len(self.walls), 1)
        kinds = {kind: (now - self._before[kind]) / steps for kind, now in self._runner.seconds.items()}
        return {
            "step_s": statistics.median(self.walls),
            "mean_step_s": sum(self.walls) / steps,
            "kinds_s": {kind: seconds for kind, seconds in kinds.items() if seconds},
            "native_calls": self.calls / steps,
            "instructions": len(self._runner.bound.program.body),
        }

    def _step(self, *arguments):
        begin = time.perf_counter()
        made = self._inner(*arguments)
        self.walls.append(time.perf_counter() - begin)
        return made

    def _native(self, *arguments):
        self.calls += 1
        return self._run(*arguments)


def main() -> None:
    """Load, warm up, answer until the input ends."""
    job = json.loads(sys.argv[1])
    from bench import engines

    if job["engine"] != "llama":
        import torch

        torch.set_num_threads(job["threads"])
    engine = {
        "moeflow": engines.load_moeflow,
        "transformers": engines.load_transformers,
        "llama": engines.load_llama,
    }[job["engine"]](job)
    job["tokens"] = 4
    engine.generate(lambda token: None)
    ready: dict = {"ready": True}
    clock = None
    if job["engine"] == "moeflow":
        from moeflow.kernels.cpu import ops as cpu
        from moeflow.kernels.cpu.library import instruction_set

        ready["instruction_set"] = instruction_set()
        ready["bytes"] = engines.step_bytes(job["model"], engine.runtime)
        step = engine.runtime.stats()["step"]
        if job["options"]["step"] == "auto":
            if step["mode"] != "native":
                raise SystemExit(f"the step is not native: {step['reason']}")
            clock = StepClock(engine.runtime)
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        job["tokens"], marks, tokens = int(line), [], []

        def on_token(token, marks=marks, tokens=tokens):
            marks.append(time.perf_counter())
            tokens.append(token)

        if clock:
            clock.clear()
        if clock:
            read_bytes_per_s = cpu.read_bandwidth()
        engine.generate(on_token)
        answer = {"token_s": statistics.median(b - a for a, b in pairwise(marks[2:])), "tokens": tokens}
        if clock:
            answer["step"] = clock.as_dict()
            answer["read_bytes_per_s"] = read_bytes_per_s
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
