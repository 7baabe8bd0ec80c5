"""A user's program, checked by `mypy --strict` against the package as installed, and never run."""

from typing_extensions import assert_type

import moeflow
from moeflow import Engine, MoeflowError, SamplingParams, load_moe


def answer(folder: str, prompts: list[str]) -> list[str]:
    """Return the texts that follow some prompts."""
    params = SamplingParams(max_new_tokens=16, temperature=0.7, seed=1)
    try:
        model = load_moe(folder, expert_memory="25%", policy="lfru", predictor=None)
    except MoeflowError as error:
        raise SystemExit(str(error)) from error
    with Engine(model, None, max_batch_size=4) as engine:
        assert_type(engine, Engine)
        completions = engine.generate(prompts, params)
        name: str = engine.add(prompts[0], params)
        engine.cancel(name)
        pieces: list[str] = list(engine.stream(prompts[0], params))
    texts: list[str] = [completion.text for completion in completions]
    return texts + pieces


version: str = moeflow.__version__
# Types are seen: under --strict an ignored error that is none is an error itself.
wrong_params = SamplingParams(temperature="hot")  # type: ignore[arg-type]
wrong_option = load_moe("folder", miss=1)  # type: ignore[arg-type]
wrong_engine = Engine(None, None, max_batch_size="4")  # type: ignore[arg-type]
