"""SIGINT at random times in generate(): the model answers right after each, with the same tokens."""

import contextlib
import gc
import random
import signal
import threading
import time
from typing import Any

from gpu.end_to_end import peak_bytes
from gpu.models import draw_prompt, generate, loaded
from gpu.worker import Tell

SIGNALS, TOKENS = 150, 12


def run(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Send the signals to a model at 25 % with a predictor, so that copies and prefetches are under way.

    Raises:
        AssertionError: an answer differs, or a thread stayed.
    """
    count = 3 if job["dry"] else SIGNALS
    drawn = random.Random(0)
    with loaded(job, "bfloat16", expert_memory="25%", predictor="auto") as model:
        prompt = draw_prompt(model, 32)
        expected = generate(model, prompt, TOKENS)
        begin = time.perf_counter()
        assert generate(model, prompt, TOKENS) == expected, "two answers without a signal differ"
        length_s, threads, caught = time.perf_counter() - begin, threading.active_count(), 0
        for number in range(count):
            caught += interrupted(model, prompt, drawn.uniform(0, length_s))
            answer = generate(model, prompt, TOKENS)
            assert answer == expected, f"after signal {number + 1}: {answer}, before all signals {expected}"
            if number % 25 == 24:
                tell({"signals": number + 1, "caught": caught, "peak_bytes": peak_bytes(job["device"])})
        model.moeflow.check_integrity()
        gc.collect()
        assert threading.active_count() <= threads, f"{threading.active_count()} threads, {threads} before the signals"
    return {"signals": count, "caught_in_generate": caught, "answer_s": length_s}


def interrupted(model: Any, prompt: Any, delay_s: float) -> bool:
    """Generate with a SIGINT after a delay; return whether it came before the end."""

    def strike(number: int, frame: object) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.default_int_handler(signal.SIGINT, None)

    signal.signal(signal.SIGALRM, strike)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(delay_s, 1e-6))
        generate(model, prompt, TOKENS)
    except KeyboardInterrupt:
        return True
    finally:
        with contextlib.suppress(KeyboardInterrupt):  # it may come right here
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
    return False
