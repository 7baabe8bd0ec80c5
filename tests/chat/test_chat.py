"""The chat on a real pseudo-terminal and in real pipes, with a tiny random Mixtral run by moeflow."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys

import pytest

from helpers.paths import ROOT
from helpers.terminal import EIGHT, ENDLESS, PROMPT, open_terminal
from moeflow.chat.chat import Chat
from moeflow.chat.conversation import Conversation
from moeflow.chat.screen import Screen
from moeflow.errors import ConfigError

ANSWERING = re.compile(r"(?:[a-z] ?){60}")  # the model says nothing else, and nobody else that many in a row


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
def test_a_second_message_says_how_much_of_its_prompt_was_kept(terminal):
    assert "kept" not in terminal.ask("never said before", "length limit")
    kept, of = re.search(r"(\d+) of (\d+) prompt tokens kept", terminal.ask("more", "length limit")).groups()
    assert int(kept) > int(of) // 2


@pytest.mark.slow
def test_failing_file_commands_say_why_and_the_chat_goes_on(terminal, tmp_path):
    terminal.ask(f"/load {tmp_path}/none.json", "error: cannot read .*none.json: No such file or directory")
    terminal.ask(f"/save {tmp_path}/none/x.json", "error: .*x.json cannot be written: No such file or directory")
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
def test_ctrl_c_within_the_handler_of_another_holds_nothing_up(folder, tmp_path):
    with open_terminal(folder, tmp_path, {"TERM": "dumb"}, max_new_tokens=ENDLESS) as terminal:
        terminal.type("hello\r")
        terminal.expect(ANSWERING)
        for _ in range(5_000):
            terminal.process.send_signal(signal.SIGINT)
        terminal.expect(r"· stopped")
        terminal.expect(PROMPT)
        terminal.type("/exit\r")
        assert terminal.expect_end() == 0


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


def test_module_imports_neither_torch_nor_rich():
    program = (
        "import sys, moeflow.chat.chat; "
        "print(sorted({'torch', 'transformers', 'rich', 'prompt_toolkit'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_a_system_prompt_that_is_no_text_is_refused_and_the_old_one_stays(model, tokenizer, tmp_path):
    screen = Screen(io.StringIO(), True)
    chat = Chat(io.StringIO(), model, tokenizer, screen, Conversation("old"), EIGHT)
    with pytest.raises(ConfigError, match="the system prompt has"):
        chat.commands["/system"][0]("a\udcff")
    chat.commands["/save"][0](str(tmp_path / "saved.json"))
    assert json.loads((tmp_path / "saved.json").read_text()) == [{"role": "system", "content": "old"}]
