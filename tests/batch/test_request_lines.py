"""Lines of a batch file: what each asks for, and what is refused by line."""

import json
import re
from dataclasses import fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.batch_lines import DEFAULTS, openai, write
from helpers.paths import ROOT
from moeflow.batch.openai_format import CHAT_URL, OPENAI_FIELDS, TEXT_URL
from moeflow.batch.requests import read_batch
from moeflow.cli.batch import EXAMPLES
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ConfigError

NAMES = (
    *("prompt", "messages", "role", "content", "type", "text", "id", "custom_id", "url", "method", "body"),
    *(field.name for field in fields(SamplingParams)),
    *OPENAI_FIELDS,
)

WORDS = ("user", "text", "\ud800", "hi")
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(), inner, max_size=3),
    max_leaves=8,
)
LINES = st.dictionaries(st.sampled_from(NAMES), _VALUES, max_size=6).map(lambda entry: json.dumps(entry).encode())


def test_a_line_says_prompt_id_and_sampling(tmp_path):
    path = write(
        tmp_path / "in.jsonl",
        {"id": "a", "prompt": " Hi", "temperature": 0.5, "stop": "x", "seed": 3},
        b"",
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]},
        {"id": 12, "prompt": "x", "stop": ["a", "b"], "logprobs": 2, "top_k": None},
    )
    requests, refused = read_batch(path, DEFAULTS)
    assert refused == []
    assert [(one.number, one.id) for one in requests] == [(1, "a"), (3, "#3"), (4, "12")]
    assert requests[0].content == " Hi"
    assert requests[0].params == SamplingParams(max_new_tokens=7, temperature=0.5, stop=("x",), seed=3)
    assert requests[1].content[1] == {"role": "user", "content": "hi"}
    assert requests[2].params == SamplingParams(max_new_tokens=7, stop=("a", "b"), logprobs=2)


def test_openai_lines_are_read_under_their_names(tmp_path):
    path = write(
        tmp_path / "in.jsonl",
        openai("a", max_tokens=5, temperature=0.5, top_p=0.9, seed=3, stop="x", logprobs=True, top_logprobs=2),
        openai("b", max_completion_tokens=6, n=1, stream=False, user="me", stop=None),
        openai("c", TEXT_URL, logprobs=3, presence_penalty=0.5),
        openai("d", messages=[{"role": "user", "content": [{"type": "text", "text": "parts"}]}]),
    )
    requests, refused = read_batch(path, DEFAULTS)
    assert refused == []
    assert requests[0].params == SamplingParams(
        max_new_tokens=5, temperature=0.5, top_p=0.9, seed=3, stop=("x",), logprobs=2
    )
    assert requests[1].params == SamplingParams(max_new_tokens=6)
    assert requests[2].params == SamplingParams(max_new_tokens=7, logprobs=3, presence_penalty=0.5)
    assert requests[2].content == "hi"
    assert requests[3].content == [{"role": "user", "content": "parts"}]
    assert {one.model for one in requests} == {"m"}


SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}


def test_what_binds_an_answer_is_read_in_both_forms(tmp_path):
    about = {"name": "n", "strict": True, "description": "d", "schema": SCHEMA}
    path = write(
        tmp_path / "in.jsonl",
        {"prompt": "a", "json_schema": SCHEMA, "logit_bias": {"5": -3}},
        {"prompt": "a", "json_schema": json.dumps(SCHEMA)},
        {"prompt": "a", "regex": "a+"},
        {"prompt": "a", "grammar": 'start: "a"'},
        openai(response_format={"type": "json_schema", "json_schema": about}, logit_bias={"5": -3}),
        openai("b", response_format={"type": "json_object"}),
        openai("c", response_format={"type": "text"}, regex="a+"),
        openai("d", TEXT_URL, json_schema=SCHEMA),
    )
    requests, refused = read_batch(path, DEFAULTS)
    assert refused == []
    schema = {"json_schema": SCHEMA}
    given = [
        {**schema, "logit_bias": {5: -3}}, schema, {"regex": "a+"}, {"grammar": 'start: "a"'},
        {**schema, "logit_bias": {5: -3}}, {"json_schema": {"type": "object"}}, {"regex": "a+"}, schema,
    ]  # fmt: skip
    assert [one.params for one in requests] == [SamplingParams(max_new_tokens=7, **each) for each in given]
    assert all(one.digest for one in requests)


def test_a_line_s_schema_takes_the_place_of_the_command_s(tmp_path):
    path = write(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "a", "regex": "a+"})
    requests, _ = read_batch(path, SamplingParams(json_schema=SCHEMA))
    assert [one.params.structure[0] for one in requests] == ["json_schema", "regex"]


def user(content, **others):
    return {"role": "user", "content": content, **others}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{not json", "not JSON"),
        (b'{"prompt": "caf\xe9"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'"text"', "no object"),
        ({"id": "x"}, "a prompt or messages"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "hi"}]}, "one of them"),
        ({"prompt": " "}, "not empty"),
        ({"prompt": ["a"]}, "not empty"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        ({"prompt": "a", "temprature": 1}, "'temprature'; known are"),
        ({"prompt": "a", "temperature": -1}, "temperature is -1"),
        ({"prompt": "a", "max_new_tokens": "many"}, "max_new_tokens is 'many'"),
        ({"prompt": "a", "stop": [1]}, "stop is"),
        (b'{"prompt": "a", "top_p": NaN}', "top_p is nan"),
        ({"prompt": "a", "id": 1.5}, "its id is 1.5"),
        ({"prompt": "a", "id": "#4"}, "give it another"),
        ({"messages": []}, "must be a list"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "message 1 has the role 'robot'"),
        ({"messages": [{"role": "user", "content": 5}]}, "only text"),
        ({"messages": [{"role": "system", "content": "hi"}]}, "none of a user"),
        ({"prompt": "a", "json_schema": {"$ref": "#"}}, "recurses for ever"),
        ({"prompt": "a", "json_schema": "{"}, "json_schema is not JSON"),
        ({"prompt": "a", "json_schema": {}, "regex": "a"}, "json_schema and regex are given"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "'x', which is no token id"),
        (openai(response_format="json"), "response_format is 'json'"),
        (openai(response_format={"type": "xml"}), "response_format is {'type': 'xml'}"),
        (openai(response_format={"type": ["xml"]}), "response_format is {'type': ['xml']}"),
        (openai(response_format={"type": "json_schema"}), "response_format has None as json_schema"),
        (openai(response_format={"type": "json_object", "schema": {"a": 1}}), "response_format has 'schema'"),
        (openai(response_format={"type": "json_object"}, json_schema={}), "response_format and json_schema; give one"),
        (openai(n=2), "n is 2"),
        (openai(stream=True), "stream is True"),
        (openai(tools=[{"type": "function"}]), "'tools'; known are"),
        (openai(url="/v1/embeddings"), "its url is '/v1/embeddings'"),
        ({**openai(), "method": "GET"}, "its method is 'GET'"),
        ({"custom_id": "x", "url": CHAT_URL}, "its body is None, no object"),
        ({"body": {}}, "no custom_id"),
        (openai(logprobs=3), "logprobs is 3"),
        (openai(prompt="both"), "'prompt'; known are"),
        (openai(n=True), "n is True"),
        (openai(stream=0), "stream is 0"),
        (openai(logprobs=1), "logprobs is 1"),
        (openai(top_logprobs=2), "wants logprobs: true"),
        (openai("a", TEXT_URL, top_logprobs=2), "it has top_logprobs"),
        (openai(max_tokens=5, max_completion_tokens=6), "max_tokens is 5 and max_completion_tokens 6"),
        (openai(model=5), "its model is 5"),
        (openai(model="\ud800"), "its model has '\\ud800' at character 1"),
        ({**openai(), "custom_id": 5}, "its custom_id is 5"),
        ({**openai(), "prompt": "beside"}, "'prompt'; known are"),
        (b'{"prompt": "a", "prompt": "b"}', "the field 'prompt' twice"),
        (b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "the field 'content' twice"),
        ({"prompt": "a", "stop": "\udcff"}, "half of a surrogate"),
        ({"messages": ["hi"]}, "message 1 is 'hi'"),
        ({"messages": [user("hi", name="Ann")]}, "message 1 has 'name'; known are role, content"),
        ({"messages": [user("hi", tool_calls=[{"id": "1"}])]}, "message 1 has 'tool_calls'"),
        ({"messages": [user([{"type": "text", "text": "a"}, IMAGE])]}, "part 2 of message 1 is 'image_url'"),
        ({"messages": [user([{**IMAGE, "text": "a"}])]}, "part 1 of message 1 is 'image_url'"),
        ({"messages": [user([{"type": "text", "text": "a", "audio": "b"}])]}, "part 1 of message 1 has 'audio'"),
        ({"messages": [user([{"type": "text", "text": 5}])]}, "part 1 of message 1 has 5 as text"),
        ({"messages": [user(["a"])]}, "part 1 of message 1 is 'a'"),
        (b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}", "message 1 is [[[[[[[...]]]]]]]; it must be"),
        (b'{"prompt": "a", "top_k": ' + b"[" * 900 + b"]" * 900 + b"}", "top_k is"),
        (b'{"prompt": "a", "id": 1' + b"0" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_bad_line_is_told_by_number_and_the_others_go_on(tmp_path, line, why):
    path = write(tmp_path / "in.jsonl", {"prompt": "first"}, line, {"prompt": "last"})
    requests, refused = read_batch(path, DEFAULTS)
    assert [one.number for one in requests] == [1, 3]
    assert [one.number for one in refused] == [2]
    assert why in refused[0].error
    assert len(refused[0].error) < 600


def test_null_fields_are_as_absent_ones(tmp_path):
    nulls = dict.fromkeys(("tools", "response_format", "logit_bias", "stop", "n", "stream", "logprobs", "max_tokens"))
    answer = {"role": "assistant", "content": "yes", "refusal": None, "annotations": [], "tool_calls": None}
    path = write(
        tmp_path / "in.jsonl",
        {**openai("a", **nulls, messages=[user("hi", name=None), answer, user("so?")]), "method": None},
        {"id": None, "prompt": "x", "messages": None, "custom_id": None, "body": None, "seed": None},
    )
    requests, refused = read_batch(path, DEFAULTS)
    assert refused == []
    assert [message["content"] for message in requests[0].content] == ["hi", "yes", "so?"]
    assert [one.params for one in requests] == [DEFAULTS, DEFAULTS]


def test_texts_of_parts_are_joined(tmp_path):
    parts = [{"type": "text", "text": "one "}, {"text": "two", "type": "text", "cache_control": None}]
    (request,), _ = read_batch(write(tmp_path / "in.jsonl", {"messages": [user(parts)]}), DEFAULTS)
    assert request.content == [user("one two")]


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(), LINES, LINES.flatmap(lambda line: st.integers(0, len(line)).map(lambda cut: line[:cut]))))
def test_any_line_is_a_request_or_refused(tmp_path, line):
    line = line.replace(b"\n", b" ")
    requests, refused = read_batch(write(tmp_path / "in.jsonl", line, {"prompt": "last"}), DEFAULTS)
    assert requests[-1].content == "last"
    assert len(requests) + len(refused) == 1 + bool(line.strip(b"\xef\xbb\xbf \t\r\n"))
    for one in requests:
        assert one.digest
        json.dumps(one.content, ensure_ascii=False).encode()
    for one in refused:
        assert 0 < len(one.error) < 600
        json.dumps(one.error, ensure_ascii=False).encode()


def test_a_second_line_of_an_id_is_refused_naming_the_first(tmp_path):
    path = write(tmp_path / "in.jsonl", {"id": "a", "prompt": "x"}, {"prompt": "y"}, {"id": "a", "prompt": "z"})
    requests, refused = read_batch(path, DEFAULTS)
    assert [one.number for one in requests] == [1, 2]
    assert (refused[0].number, refused[0].id) == (3, "#3")
    assert "'a' is that of line 1" in refused[0].error


def test_lines_without_a_seed_get_one_each_from_the_default(tmp_path):
    path = write(tmp_path / "in.jsonl", {"prompt": "x"}, {"prompt": "x"}, {"prompt": "x", "seed": 9})
    requests, _ = read_batch(path, SamplingParams(seed=100))
    assert [one.params.seed for one in requests] == [101, 102, 9]
    assert [one.params.seed for one in read_batch(path, SamplingParams(seed=2**63 - 2))[0]] == [2**63 - 1, 0, 9]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\r\n\r\n{"prompt": "y"}')
    assert [one.content for one in read_batch(path, DEFAULTS)[0]] == ["x", "y"]
    path.write_bytes(b'\xef\xbb\xbf\n{"prompt": "x"}')
    assert read_batch(path, DEFAULTS)[1] == []


@pytest.mark.parametrize("name", ["missing.jsonl", "empty.jsonl", "array.json", "."])
def test_a_file_without_a_request_is_refused(tmp_path, name):
    (tmp_path / "empty.jsonl").write_bytes(b"\n \n")
    (tmp_path / "array.json").write_text(json.dumps([{"prompt": "x"}, {"prompt": "y"}], indent=1))
    with pytest.raises(ConfigError, match=r"JSON lines|one request a line|no request in 8 lines: line 1: .*JSON"):
        read_batch(tmp_path / name, DEFAULTS)


def test_requests_that_documentation_and_help_show_are_requests(tmp_path):
    page = (ROOT / "docs" / "batch.md").read_text()
    shown = re.findall(r"^(\{.*\})$", page.partition("## Answers")[0], re.MULTILINE)
    shown = [line for line in shown if '"finish_reason"' not in line]
    written = EXAMPLES.replace("[...]", '[{"role": "user", "content": "x"}]')
    shown += [line.strip() for line in written.splitlines()[1:-1]]
    shown.append(re.search(r"^echo '(\{.*\})' >", (ROOT / "README.md").read_text(), re.MULTILINE)[1])
    assert len(shown) == 9
    for number, line in enumerate(shown):
        path = write(tmp_path / f"{number}.jsonl", line.encode())
        assert read_batch(path, DEFAULTS)[1] == [], line
