"""A prompt from a pipe: one answer, its figures, and what is refused."""

import io
import json
import os
import re
import subprocess
import threading

import pytest
from transformers import AutoModelForCausalLM

from helpers.paths import ROOT
from helpers.terminal import DEADLINE_S, EIGHT, driver_command
from moeflow import load_moe
from moeflow.chat.chat import read_prompt, run_chat, run_prompt
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ConfigError, MoeflowError


@pytest.mark.slow
def test_piped_prompt_prints_only_the_answer_on_stdout(folder):
    done = subprocess.run(
        driver_command(folder, max_new_tokens=8),
        input="two\nlines\n",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"[a-z ]{8}\n", done.stdout)
    assert re.search(r"^8 tok · .* · hit rate \d+ % \(decode\) · .* · length limit reached$", done.stderr, re.MULTILINE)


def test_json_is_one_object_with_the_answer_and_its_figures(folder, tokenizer):
    out, model = io.StringIO(), load_moe(folder, expert_memory="75%")
    run_chat(model, tokenizer, EIGHT, stdin=io.StringIO("hello"), stdout=out, as_json=True)
    figures = json.loads(out.getvalue())
    assert len(figures["text"]) == figures["num_new_tokens"] == 8
    assert figures["stopped"] == "length"
    assert figures["moeflow"]["decode"]["tokens"] == 7
    assert 0 <= figures["moeflow"]["decode"]["hit_rate"] <= 1


def test_prompt_of_a_pipe_is_one_message_without_its_last_newline(model, tokenizer):
    out, direct = io.StringIO(), io.StringIO()
    assert run_chat(model, tokenizer, EIGHT, stdin=io.StringIO("a\nb\n"), stdout=out) == 0
    assert run_prompt(model, tokenizer, "a\nb", EIGHT, stdout=direct) == 0
    assert out.getvalue() == direct.getvalue()


def test_a_byte_order_mark_is_no_part_of_the_prompt():
    assert read_prompt(piped(b"\xef\xbb\xbfhi\r\n")) == "hi"


def test_model_without_moeflow_reports_only_timing(model, tokenizer):
    out, err = io.StringIO(), io.StringIO()
    run_prompt(model, tokenizer, "hello", SamplingParams(max_new_tokens=4), stdout=out, stderr=err)
    assert re.fullmatch(r"4 tok · [\d.]+ tok/s · TTFT [\d.]+ m?s · length limit reached\n", err.getvalue())


def piped(data, errors="strict"):
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors=errors)


NO_PROMPTS = (b"", b"\n\n", b"\xef\xbb\xbf\n", b"\xff\xfe")


@pytest.mark.parametrize("stdin", [*map(piped, NO_PROMPTS), piped(b"a\xff", "surrogateescape")])
def test_empty_or_binary_prompt_is_refused(model, tokenizer, stdin):
    with pytest.raises(ConfigError, match="prompt"):
        run_chat(model, tokenizer, stdin=stdin, stdout=io.StringIO())


def test_missing_template_is_noted_beside_the_answer(model, tokenizer):
    tokenizer.chat_template = None
    out, err = io.StringIO(), io.StringIO()
    run_prompt(model, tokenizer, "The sea", SamplingParams(max_new_tokens=4), stdout=out, stderr=err)
    assert re.fullmatch(r"[a-z ]{4}\n", out.getvalue())
    assert err.getvalue().count("no chat template") == 1


def test_prompt_longer_than_the_context_is_refused(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder, max_position_embeddings=128)
    with pytest.raises(MoeflowError, match="shorten it"):
        run_prompt(model, tokenizer, "x" * 500, stderr=io.StringIO())


def test_no_thread_outlives_an_answer(model, tokenizer):
    run_prompt(model, tokenizer, "hello", SamplingParams(max_new_tokens=4), stdout=io.StringIO(), stderr=io.StringIO())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("moeflow-answer")]
