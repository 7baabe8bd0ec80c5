"""The chat on a real pseudo-terminal and in real pipes, with a tiny random Mixtral run by moeflow."""

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import contextmanager
from string import ascii_lowercase

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from helpers.paths import ROOT
from helpers.small_tokenizers import byte_tokenizer
from moeflow import load_moe
from moeflow.chat.chat import run_chat, run_prompt
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ConfigError, MoeflowError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EIGHT = SamplingParams(max_new_tokens=8)
DEADLINE_S = 60
PROMPT = r"(?m)^>"
ENDLESS = 30_000  # tokens: more than the model says before a test is over
ANSWERING = re.compile(r"(?:[a-z] ?){60}")  # the model says nothing else, and nobody else that many in a row

DRIVER = """
import json, os, sys
if sys.stdin.isatty():
    os.close(os.open(os.ttyname(0), os.O_RDWR))  # makes it the controlling terminal, where Ctrl-C comes from
from transformers import AutoTokenizer
from moeflow import load_moe
from moeflow.chat.chat import run_chat
from moeflow.engine.sampling_params import SamplingParams
folder, options = sys.argv[1], json.loads(sys.argv[2])
model = load_moe(folder, expert_memory="75%")
sys.exit(run_chat(model, AutoTokenizer.from_pretrained(folder), SamplingParams(**options), name="tiny"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that says small letters and spaces without end."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer(eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=2 * ENDLESS,
        eos_token_id=tokenizer.eos_token_id, initializer_range=0.5,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    sayable = {tokenizer(char)["input_ids"][0] for char in ascii_lowercase + " "}
    model.generation_config.suppress_tokens = [token for token in range(len(tokenizer)) if token not in sayable]
    model.save_pretrained(folder)
    (folder / "driver.py").write_text(DRIVER)
    return folder


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def driver_command(folder, **options):
    return [sys.executable, str(folder / "driver.py"), str(folder), json.dumps(options)]


class Terminal:
    """The other end of a pseudo-terminal: types, and reads until something has appeared."""

    def __init__(self, master, process):
        self.master = master
        self.process = process
        self.unread = ""
        self.greeting = ""

    def type(self, text):
        os.write(self.master, text.encode())

    def expect(self, pattern):
        """Read up to and including a match of `pattern`; returns everything up to its end."""
        deadline = time.monotonic() + DEADLINE_S
        while not (found := re.search(pattern, self.unread)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.unread!r}"
            chunk = self._read(deadline)
            assert chunk is not None, f"the program ended without {pattern!r}: {self.unread!r}"
            # Colours and cursor movements go; what they move around stays in the order it was written.
            self.unread = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r", "", self.unread + chunk)
        text, self.unread = self.unread[: found.end()], self.unread[found.end() :]
        return text

    def ask(self, line, answer):
        """Type a line, and read up to `answer` and the next prompt."""
        self.type(line + "\r")
        text = self.expect(answer)
        self.expect(PROMPT)
        return text

    def expect_end(self):
        deadline = time.monotonic() + DEADLINE_S
        while self._read(deadline) is not None:
            assert time.monotonic() < deadline, "the program did not end"
        return self.process.wait(timeout=DEADLINE_S)

    def _read(self, deadline):
        """Return what has arrived by `deadline`, None once the program has closed its end."""
        ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            return ""
        try:
            return os.read(self.master, 65536).decode(errors="replace") or None
        except OSError:  # Linux says EIO where others say end of file
            return None


@contextmanager
def open_terminal(folder, cache, environment, **options):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    env |= {"PYTHONPATH": str(ROOT), "MOEFLOW_CACHE": str(cache), "PROMPT_TOOLKIT_NO_CPR": "1", "LANG": "C.UTF-8"}
    env |= environment
    process = subprocess.Popen(
        driver_command(folder, **options), stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True
    )
    os.close(slave)
    terminal = Terminal(master, process)
    try:
        terminal.greeting = terminal.expect("tiny · ") + terminal.expect(PROMPT)
        yield terminal
    finally:
        process.kill()
        process.wait()
        os.close(master)


@pytest.fixture(scope="module")
def shared_terminal(folder, tmp_path_factory):
    environment = {"TERM": "xterm", "NO_COLOR": "1"}
    with open_terminal(folder, tmp_path_factory.mktemp("cache"), environment, max_new_tokens=8) as terminal:
        yield terminal


@pytest.fixture
def terminal(shared_terminal):
    shared_terminal.ask("/reset", "conversation forgotten")
    shared_terminal.ask("/system", "system prompt removed")
    return shared_terminal


@pytest.mark.slow
def test_answer_is_followed_by_its_figures(terminal):
    text = terminal.ask("hello", r"length limit reached\n")
    pattern = (
        r"\n[a-z ]{8}\n8 tok · [\d.]+ tok/s · TTFT [\d.]+ m?s · hit rate \d+ % \(decode\) · [\d.]+ [KM]?i?B read · "
        r"experts [\d.]+ KiB of [\d.]+ KiB · process [\d.]+ [MG]iB · length limit reached\n$"
    )
    assert re.search(pattern, text)


@pytest.mark.slow
def test_saved_conversation_comes_back_after_reset(terminal, tmp_path):
    first, second = tmp_path / "first file.json", tmp_path / "second.json"
    terminal.ask("/system Be brief.", "system prompt set")
    terminal.ask("hello", "length limit")
    terminal.ask(f"/save {first}", "3 messages saved to")
    messages = json.loads(first.read_text())
    assert [(m["role"], m["content"]) for m in messages[:2]] == [("system", "Be brief."), ("user", "hello")]
    assert messages[2]["role"] == "assistant"
    assert len(messages[2]["content"]) == 8

    terminal.ask("/reset", "forgotten")
    terminal.ask(f"/save {second}", "1 messages saved to")
    assert json.loads(second.read_text()) == messages[:1]
    terminal.ask(f"/load {first}", "3 messages loaded from")
    terminal.ask(f"/save {second}", "3 messages saved to")
    assert json.loads(second.read_text()) == messages
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first file.json", "second.json"]


@pytest.mark.slow
def test_conversation_is_part_of_the_next_prompt(terminal):
    once = terminal.ask("hello", r"8 tok")
    again = terminal.ask("hello", r"8 tok")
    terminal.ask("/reset", "forgotten")
    assert terminal.ask("hello", r"8 tok") == once != again


@pytest.mark.slow
def test_failing_file_commands_say_why_and_the_chat_goes_on(terminal, tmp_path):
    terminal.ask(f"/load {tmp_path}/none.json", "error: cannot read .*none.json: No such file or directory")
    terminal.ask(f"/save {tmp_path}/none/x.json", "error: cannot write .*x.json: No such file or directory")
    terminal.ask("/load", "error: /load needs a file: /load FILE")


@pytest.mark.slow
def test_unknown_command_names_help_and_help_names_every_command(terminal):
    terminal.ask("/halp", "error: there is no command /halp; /help lists them")
    text = terminal.ask("/help", "Ctrl-D or /exit leaves")
    for command in ("/reset", "/system TEXT", "/save FILE", "/load FILE", "/stats", "/help", "/exit"):
        assert command in text


@pytest.mark.slow
def test_stats_show_the_counters_of_the_runtime(terminal):
    terminal.ask("hello", "length limit")
    text = terminal.ask("/stats", r"expert budget .*\n.* threads .*\n")
    for label in ("slots on cpu", "prefill", "decode", "hit rate", "evictions", "process"):
        assert label in text


@pytest.mark.slow
def test_control_c_at_the_prompt_clears_the_line_and_says_how_to_leave(terminal):
    terminal.type("half a line")
    terminal.expect("half a line")
    terminal.type("\x03")
    terminal.expect("line cleared; Ctrl-D or /exit leaves\n")
    terminal.expect(PROMPT)
    terminal.ask("/halp", "no command /halp;")


@pytest.mark.slow
def test_backslash_and_alt_enter_begin_a_new_line(terminal, tmp_path):
    terminal.ask("one\\\rtwo\x1b\rthree", "length limit")
    terminal.ask(f"/save {tmp_path}/m.json", "saved")
    assert json.loads((tmp_path / "m.json").read_text())[0]["content"] == "one\ntwo\nthree"


@pytest.mark.slow
def test_slash_after_a_space_is_text(terminal, tmp_path):
    terminal.ask(" /etc is what?", "length limit")
    terminal.ask(f"/save {tmp_path}/m.json", "saved")
    assert json.loads((tmp_path / "m.json").read_text())[0]["content"] == "/etc is what?"


@pytest.mark.slow
@pytest.mark.parametrize(("term", "leave"), [("dumb", "/exit\r"), ("xterm-256color", "\x04")])
def test_control_c_stops_the_answer_and_not_the_program(folder, tmp_path, term, leave):
    with open_terminal(folder, tmp_path, {"TERM": term}, max_new_tokens=ENDLESS) as terminal:
        terminal.type("hello\r")
        terminal.expect(ANSWERING)
        terminal.type("\x03\x03")
        terminal.expect(r"\d+ tok · .* · stopped")
        terminal.expect(PROMPT)
        terminal.ask(f"/save {tmp_path}/m.json", "2 messages saved")
        partial = json.loads((tmp_path / "m.json").read_text())[1]["content"]
        assert 60 <= len(partial) < ENDLESS
        terminal.type("again\r")
        terminal.expect(ANSWERING)
        terminal.type("TYPED AHEAD\x03")
        assert "TYPED" not in terminal.expect(r"· stopped")
        terminal.expect(PROMPT)
        terminal.type(leave)
        assert terminal.expect_end() == 0
    assert "+hello" in (tmp_path / "chat_history").read_text()
    assert (tmp_path / "chat_history").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_failing_answer_and_missing_template_and_history_leave_the_chat_running(folder, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(folder, broken)
    (broken / "chat_template.jinja").unlink()
    cache = tmp_path / "file, not a folder"
    cache.touch()
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    with open_terminal(broken, cache, {"TERM": "xterm", "NO_COLOR": "1"}, max_new_tokens=8) as terminal:
        assert "no chat template" in terminal.greeting
        terminal.ask("long " * 20, "error: this message takes 99 tokens .* context is 64: shorten it")
        assert "no chat template" not in terminal.ask("short", "8 tok")
        terminal.ask("x" * 50, "the context is full: forgot the oldest 1 exchange")
        terminal.ask(f"/save {tmp_path}/m.json", "2 messages saved")


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


def test_model_without_moeflow_reports_only_timing(model, tokenizer):
    out, err = io.StringIO(), io.StringIO()
    run_prompt(model, tokenizer, "hello", SamplingParams(max_new_tokens=4), stdout=out, stderr=err)
    assert re.fullmatch(r"4 tok · [\d.]+ tok/s · TTFT [\d.]+ m?s · length limit reached\n", err.getvalue())


@pytest.mark.parametrize("text", ["", "\n\n", b"\xff\xfe"])
def test_empty_or_binary_prompt_is_refused(model, tokenizer, text):
    stdin = io.StringIO(text) if isinstance(text, str) else io.TextIOWrapper(io.BytesIO(text), encoding="utf-8")
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


def test_module_imports_neither_torch_nor_rich():
    program = (
        "import sys, moeflow.chat.chat; "
        "print(sorted({'torch', 'transformers', 'rich', 'prompt_toolkit'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
