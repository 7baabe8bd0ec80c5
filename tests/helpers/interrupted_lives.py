"""Ctrl-C in each phase of a model's life: run with a folder and a number of lines; prints what each interrupt left.

A real signal comes at sampled lines of moeflow's code, and after each the process must hold what it held before: no
thread, descriptor, mapping or arena more.
"""

import dis
import functools
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import moeflow
from moeflow import Engine, SamplingParams, load_moe
from moeflow.chat.answer import stream_answer
from moeflow.offload.slot_pool import SlotPool

PACKAGE = str(Path(moeflow.__file__).parent)
FOLDER, NUM_LINES = sys.argv[1], int(sys.argv[2])
PROMPT = torch.arange(1, 12)[None]


@functools.cache
def first_offset(code: Any, line: int) -> int:
    return next(offset for offset, number in dis.findlinestarts(code) if number == line)


class Interrupter:
    """A trace function that sends the signal at one line; with line 0 it only counts."""

    def __init__(self, line: int) -> None:
        self.line, self.count, self.place = line, 0, ""

    def __call__(self, frame: Any, event: str, argument: object) -> "Interrupter | None":
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        # A line that is come back to may be the end of a `with` block, where Python never looks for signals.
        if event == "line" and frame.f_lasti == first_offset(frame.f_code, frame.f_lineno):
            self.count += 1
            if self.count == self.line:
                self.place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
        return self


def interrupt(call: Callable[[], object], line: int) -> Interrupter:
    interrupter = Interrupter(line)
    sys.settrace(interrupter)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return interrupter


def held() -> dict[str, object]:
    gc.collect()
    folder = Path("/proc/self/fd")
    return {
        "threads": [thread.name for thread in threading.enumerate()],
        "tasks": len(os.listdir("/proc/self/task")),
        "files": sorted(os.readlink(file) for file in folder.iterdir() if file.exists()),
        "mapped": Path("/proc/self/maps").read_text().count(FOLDER),
        "arenas": sum(type(found) is SlotPool and found._arena is not None for found in gc.get_objects()),
    }


def load(**options: Any) -> Any:
    return load_moe(FOLDER, device="cpu", expert_memory="50%", **options)


def used() -> Any:
    model = load()
    model(PROMPT)
    return model


def busy_engine() -> Engine:
    engine = Engine(used(), group_size=2)
    for number in range(6):
        engine.add([3 + number, 4, 5, 6 + number], SamplingParams(max_new_tokens=9, ignore_eos=True))
    for _ in range(3):
        engine.step()
    return engine


def close_engine(engine: Any) -> None:
    engine.close()
    engine.check_integrity()
    assert engine.finished
    assert not engine.stats()["kv_used_bytes"]
    assert not engine.stats()["kv_kept_bytes"]
    engine.model.moeflow.close()


def answering() -> list:
    model = used()
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    params = SamplingParams(max_new_tokens=20, temperature=0.0)
    stream = stream_answer(model, tokenizer, PROMPT, params)
    next(stream)
    return [model, stream]


def close_answer(made: list) -> None:
    made[1].close()
    assert made[1].answer is not None
    made[0].moeflow.close()


def close(model: Any) -> None:
    model.moeflow.close()
    assert model.moeflow.closed


def leave_block(model: Any) -> None:
    with model.moeflow:
        pass


def collect(made: list) -> None:
    made.clear()
    gc.collect()


def nothing(made: object) -> None:
    """Leave the rest to garbage collection."""


PHASES: dict[str, tuple[Callable[[], Any], Callable[[Any], object], Callable[[Any], object]]] = {
    "load": (lambda: None, lambda _: load(), nothing),
    "first use": (load, lambda model: model(PROMPT), close),
    "close": (used, lambda model: model.moeflow.close(), close),
    "with block": (used, leave_block, nothing),
    "garbage collection": (lambda: [used()], collect, nothing),
    "close of an engine": (busy_engine, lambda engine: engine.close(), close_engine),
    "close of an answer": (answering, lambda made: made[1].close(), close_answer),
}


@torch.no_grad()
def run() -> None:
    model = used()
    expected = model(PROMPT).logits
    model.moeflow.close()
    del model
    close_answer(answering())
    gc.collect()
    gc.freeze()  # what is there stays, and need not be walked over each time
    before = held()
    for name, (prepare, act, finish) in PHASES.items():
        made = prepare()
        count = interrupt(functools.partial(act, made), 0).count
        finish(made)
        for line in sorted({1 + sample * (count - 1) // (NUM_LINES - 1) for sample in range(NUM_LINES)}):
            made = prepare()
            place = interrupt(functools.partial(act, made), line).place
            finish(made)
            del made
            deadline = time.monotonic() + 5
            while (after := held()) != before and time.monotonic() < deadline:
                os.sched_yield()  # a thread may be about to end
            for kind in before:
                if after[kind] != before[kind]:
                    print(f"{name}, line {line} ({place}): {kind} were {before[kind]}, are {after[kind]}")
                    before = after
        print(f"{name}: {count} lines", file=sys.stderr)
    model = load()
    assert torch.equal(model(PROMPT).logits, expected)


if __name__ == "__main__":
    tqdm.monitor_interval = 0  # no thread of its own, whose beginning is a matter of time
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    run()
