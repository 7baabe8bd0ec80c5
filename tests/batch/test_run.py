"""`answer_batch` on an engine and a file: every request has its line, whatever happens to others."""

import json

import pytest

from helpers.small_tokenizers import letter_tokenizer
from moeflow.batch.requests import BatchRequest
from moeflow.batch.results import BatchFile
from moeflow.batch.run import answer_batch
from moeflow.engine.engine import Engine
from moeflow.engine.sampling_params import SamplingParams

PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True)
ALTERNATING = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0].content }}"


@pytest.fixture(scope="module")
def tokenizer():
    return letter_tokenizer(chat_template=ALTERNATING)


def requests_of(*contents):
    return [BatchRequest(number, f"r{number}", None, content, PARAMS) for number, content in enumerate(contents, 1)]


def answered(engine, tokenizer, requests, path, on_step=lambda num_new, ended: None, num_ahead=2):
    """Run a batch, and return its lines in their order and what was told of each step."""
    told = []

    def heard(*step):
        told.append(step)
        on_step(*step)

    with BatchFile(path) as file:
        answer_batch(engine, tokenizer, requests, file, num_ahead=num_ahead, on_step=heard)
    assert engine.finished
    assert engine.stats()["kv_used_bytes"] == 0
    return [json.loads(line) for line in path.read_text().splitlines()], told


def test_every_request_has_one_line_and_steps_add_up(mixtral, tokenizer, tmp_path):
    requests = requests_of("one", "two", "three", "four", "five")
    engine = Engine(mixtral, tokenizer)
    lines, told = answered(engine, tokenizer, requests, tmp_path / "out.jsonl")
    names = ["r1", "r2", "r3", "r4", "r5"]
    assert sorted(line["id"] for line in lines) == names
    assert {name: sum(num_new.get(name, 0) for num_new, _ in told) for name in names} == dict.fromkeys(names, 6)
    assert sorted(name for _, ended in told for name in ended) == names
    texts = [done.text for done in engine.generate([request.content for request in requests], PARAMS)]
    assert {line["id"]: line["text"] for line in lines} == dict(zip(names, texts, strict=True))


def test_the_engine_holds_no_more_requests_than_it_is_to(mixtral, tokenizer, tmp_path):
    engine, held = Engine(mixtral, tokenizer), []

    def count(*step):
        held.append(engine.stats()["running"] + engine.stats()["waiting"])

    answered(engine, tokenizer, requests_of(*"abcdefgh"), tmp_path / "out.jsonl", count, num_ahead=3)
    assert max(held) == 3


def test_messages_that_the_template_refuses_fail_alone(mixtral, tokenizer, tmp_path):
    turns = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user")]
    lines, told = answered(
        Engine(mixtral, tokenizer), tokenizer, requests_of(turns, turns[:1], "last"), tmp_path / "out.jsonl"
    )
    assert told[0] == ({}, ["r1"])
    assert lines[0]["id"] == "r1"
    assert "template refuses this conversation: one turn only" in lines[0]["error"]
    assert {line["id"]: len(line["text"]) > 0 for line in lines[1:]} == {"r2": True, "r3": True}


def test_a_template_that_is_no_program_fails_its_requests_and_no_others(mixtral, tmp_path):
    broken = letter_tokenizer(chat_template="{{ 1 + 'a' }}")
    messages = [{"role": "user", "content": "hi"}]
    requests = requests_of("first", messages, "\ud800", "last")
    lines, _ = answered(Engine(mixtral, broken), broken, requests, tmp_path / "out.jsonl")
    found = {line["id"]: line.get("error", "answered") for line in lines}
    assert "template refuses this conversation: TypeError" in found.pop("r2")
    assert "half of a surrogate pair" in found.pop("r3")
    assert found == {"r1": "answered", "r4": "answered"}


def test_a_system_message_is_said_once_and_before_the_others(mixtral, tmp_path):
    roles = letter_tokenizer(chat_template="{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    engine = Engine(mixtral, roles)
    (line,), _ = answered(engine, roles, requests_of(messages), tmp_path / "out.jsonl")
    assert line["text"] == engine.generate(["system be brief user hi "], PARAMS)[0].text


def test_a_request_cancelled_in_the_middle_has_a_line_that_says_so(mixtral, tokenizer, tmp_path):
    engine = Engine(mixtral, tokenizer)
    whole, _ = answered(engine, tokenizer, requests_of("one", "two", "three"), tmp_path / "whole.jsonl")
    lines, _ = answered(
        engine, tokenizer, requests_of("one", "two", "three"), tmp_path / "out.jsonl", lambda *step: engine.cancel("r2")
    )
    found, whole = ({line["id"]: line for line in each} for each in (lines, whole))
    assert found["r2"] == {"id": "r2", "line": 2, "error": "cancelled"}
    assert (found["r1"], found["r3"]) == (whole["r1"], whole["r3"])
