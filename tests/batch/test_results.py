"""Reading requests and writing answers: bad lines stay alone, a killed run leaves nothing half done."""

import fcntl
import os
import resource
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.batch_lines import DEFAULTS, answer, completion, records, request
from moeflow.batch.openai_format import CHAT_URL, TEXT_URL
from moeflow.batch.requests import BatchRequest, RefusedLine
from moeflow.batch.results import BatchFile, answer_record, failure_record
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ConfigError, MoeflowError


def test_answers_have_the_form_of_their_requests():
    logprobs = [(-0.5, [(4, -0.5), (9, -1.0)]), (-0.25, [(5, -0.25), (9, -2.0)])]
    own = answer_record(request(), completion(logprobs=logprobs), str)
    assert own == {
        "id": "id-1", "text": "ok", "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 2,
        "request": request().digest,
        "logprobs": [
            {"token_id": 4, "logprob": -0.5, "top": [(4, -0.5), (9, -1.0)]},
            {"token_id": 5, "logprob": -0.25, "top": [(5, -0.25), (9, -2.0)]},
        ],
    }  # fmt: skip
    scored = answer_record(request(), completion(prompt_logprobs=[None, (-0.5, []), (-1.0, [(3, -1.0)])]), str)
    assert scored["prompt_logprobs"] == [
        {"token_id": 1, "logprob": None, "top": []},
        {"token_id": 2, "logprob": -0.5, "top": []},
        {"token_id": 3, "logprob": -1.0, "top": [(3, -1.0)]},
    ]
    messages = [{"role": "user", "content": "hi"}]
    chat = answer_record(request(2, CHAT_URL, messages, model="m"), completion(logprobs=logprobs), str)
    assert (chat["custom_id"], chat["error"], chat["response"]["status_code"]) == ("id-2", None, 200)
    body = chat["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "m")
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "ok"}
    assert [entry["token"] for entry in body["choices"][0]["logprobs"]["content"]] == ["4", "5"]
    text = answer_record(request(3, TEXT_URL), completion(logprobs=logprobs), str)["response"]["body"]
    assert text["object"] == "text_completion"
    assert text["choices"][0]["text"] == "ok"
    assert text["choices"][0]["logprobs"]["token_logprobs"] == [-0.5, -0.25]


def test_failures_say_line_and_reason():
    assert failure_record(RefusedLine(4, "#4", None, "x"), "not JSON") == {"id": "#4", "line": 4, "error": "not JSON"}
    failed = failure_record(request(5, CHAT_URL), "too long")
    assert (failed["custom_id"], failed["response"]) == ("id-5", None)
    assert failed["error"] == {"code": "failed", "message": "too long", "line": 5}


def test_what_was_appended_is_finished_in_the_next_run(tmp_path):
    path = tmp_path / "out.jsonl"
    with BatchFile(path) as file:
        file.append(answer(1, text="é\u2028漢\n"))
        file.append(failure_record(request(2, CHAT_URL), "too long"))
        assert len(records(path)) == 2, "each line is there before the file is closed"
    with BatchFile(path) as file:
        assert file.finished == {"id-1": None, "id-2": "too long"}
        assert file.digests == {"id-1": request(1).digest}
        file.append(answer(3))
    assert [record.get("custom_id", record["id"]) for record in records(path)] == ["id-1", "id-2", "id-3"]
    assert records(path)[0]["text"] == "é\u2028漢\n"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_goes_on_with_its_whole_lines(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "out.jsonl"
    lines = [answer(1), failure_record(request(2), "x"), answer_record(request(3, TEXT_URL), completion("é"), str)]
    with BatchFile(path) as file:
        for record in lines:
            file.append(record)
    whole = path.read_bytes()
    size = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:size])
    num_whole = whole[:size].count(b"\n")
    with BatchFile(path) as file:
        assert list(file.finished) == ["id-1", "id-2", "id-3"][:num_whole]
        for record in lines[num_whole:]:
            file.append(record)
    assert path.read_bytes() == whole


def test_lines_that_are_forgotten_can_be_written_anew(tmp_path):
    path = tmp_path / "out.jsonl"
    with BatchFile(path) as file:
        for record in (answer(1), failure_record(request(2), "disk"), answer(3)):
            file.append(record)
    with BatchFile(path) as file:
        assert list(file.finished) == ["id-1", "id-2", "id-3"]
        file.forget({"id-2"})
        assert list(file.finished) == ["id-1", "id-3"]
        with pytest.raises(ConfigError, match="another process"):
            BatchFile(path)
        file.append(answer(2))
    assert [record["id"] for record in records(path)] == ["id-1", "id-3", "id-2"]
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_forgetting_keeps_a_link_and_the_file_s_mode(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out.jsonl")
    with BatchFile(tmp_path / "link") as file:
        file.append(failure_record(request(1), "disk"))
    (tmp_path / "out.jsonl").chmod(0o640)
    with BatchFile(tmp_path / "link") as file:
        file.forget({"id-1"})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert (tmp_path / "out.jsonl").stat().st_mode & 0o777 == 0o640


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path):
    path = tmp_path / "out.jsonl"
    with BatchFile(path) as file:
        file.append(answer(1))
        with pytest.raises(ConfigError, match="being written by another process"):
            BatchFile(path)
    BatchFile(path).close()


def test_a_file_that_is_replaced_while_it_is_opened_is_refused(tmp_path, monkeypatch):
    """As by a run that forgets lines and ends in this moment: what is appended would be lost with the old file."""
    path, lock = tmp_path / "out.jsonl", fcntl.flock
    (tmp_path / "new").touch()

    def replaced(descriptor, how):
        os.replace(tmp_path / "new", path)
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", replaced)
    with pytest.raises(ConfigError, match="being written by another process"):
        BatchFile(path)


@pytest.mark.parametrize(
    "content",
    [
        b"my notes",
        b"my notes\n",
        b'{"id": "a", "prompt": "an input"}\n',
        b'[1]\n{"id": "x',
        b'{"id": 5, "error": "x"}\n',
        b'{"id": "a", "text": "x", "finish_reason": "stop"}\n',
        b'{"id": "a", "custom_id": "b", "response": 1, "error": null}\n',
        b'{"id": "a", "custom_id": "b", "response": {"request_id": null}, "error": null}\n',
    ],
)
def test_a_file_of_something_else_is_refused_and_stays_as_it_was(tmp_path, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="line 1 is no answer of a batch"):
        BatchFile(path)
    assert path.read_bytes() == content


def test_an_output_that_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        BatchFile(tmp_path / "no" / "such" / "folder")


@pytest.mark.parametrize("path", ["/dev/null", "pipe"])
def test_an_output_from_which_no_run_could_go_on_is_refused(tmp_path, path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="no plain file"):
        BatchFile(tmp_path / path)


def test_a_disk_that_is_full_in_the_middle_leaves_whole_lines(tmp_path):
    """A limit on the file's size makes the system refuse the rest of a line, as a full disk does."""
    path = tmp_path / "out.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with BatchFile(path) as file:
            file.append(answer(1))
            size = path.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
            with pytest.raises(MoeflowError, match="The 1 lines before are kept"):
                file.append(answer(2))
            assert path.stat().st_size == size
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            file.append(answer(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [record["id"] for record in records(path)] == ["id-1", "id-2"]


def test_a_digest_tells_content_sampling_id_and_model_apart_and_nothing_else():
    one = request()
    sampled = BatchRequest(1, "id-1", None, "hi", SamplingParams(max_new_tokens=8))
    others = [request(content="ho"), request(content=[{"role": "user", "content": "hi"}]), request(2), sampled]
    others.append(request(answered_by="another"))
    assert len({each.digest for each in [one, *others]}) == 6
    assert BatchRequest(9, "id-1", CHAT_URL, "hi", DEFAULTS, model="m").digest == one.digest
    assert one.digest == "56d16c75cad760ce", "answers in files would be taken for those of others"


def test_a_line_whose_noting_was_interrupted_is_counted_after_reading(tmp_path):
    class Interrupting(dict):
        def __getitem__(self, key):
            raise KeyboardInterrupt

    with BatchFile(tmp_path / "out.jsonl") as file:
        file.append(answer(1))
        with pytest.raises(KeyboardInterrupt):
            file.append(Interrupting(answer(2)))
        assert list(file.finished) == ["id-1"]
        file.read()
        assert list(file.finished) == ["id-1", "id-2"]
