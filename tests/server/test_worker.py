"""The worker: clients that leave, errors of passes, a closed model, the limit of the queue, and the end of a server."""

import asyncio
import threading

import pytest

from helpers.servers import (
    CHAT,
    TEXT,
    events,
    finished,
    raw_request,
    raw_socket,
    refused,
    serving,
    small_model,
    streamed,
    until,
    user,
)
from helpers.small_tokenizers import letter_tokenizer
from moeflow.engine.sampling_params import SamplingParams
from moeflow.loading.load_moe import load_moe
from moeflow.server import ServerSettings
from moeflow.server.service import Service
from moeflow.server.worker import Asked

HELLO = {"messages": user("hello"), "max_tokens": 2}
LONG = {"messages": user("hello"), "max_tokens": 4000, "ignore_eos": True}


def begin(response):
    """Read the first events of a stream, and return the iterator over the rest."""
    coming = events(response)
    for _ in range(3):
        next(coming)
    return coming


def counts(client):
    return client.get("/stats").json()["engine"]


def test_a_client_that_leaves_its_stream_ends_its_requests(small):
    with serving(small) as client:
        with client.stream("POST", CHAT, json={**LONG, "n": 2, "stream": True}) as response:
            begin(response)
        until(lambda: finished(client, "cancelled") == 2)
        assert (counts(client)["running"], counts(client)["waiting"]) == (0, 0)


def test_a_client_that_leaves_before_a_whole_answer_ends_its_request(small):
    with serving(small) as client:
        with raw_socket(client) as leaving:
            leaving.sendall(raw_request(LONG))
            until(lambda: counts(client)["running"] == 1)
        until(lambda: finished(client, "cancelled") == 1)


def test_streams_run_together_and_each_is_as_if_alone(small):
    bodies = [{"prompt": f"prompt {number}", "max_tokens": 20 + number} for number in range(6)]
    with serving(small) as client:
        alone = [client.post(TEXT, json=body).json()["choices"][0]["text"] for body in bodies]
        found = {}

        def ask(number):
            chunks = streamed(client, TEXT, bodies[number])
            assert chunks.pop() == "[DONE]"
            found[number] = "".join(chunk["choices"][0]["text"] for chunk in chunks)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found.get(number) for number in range(6)] == alone


def test_an_error_of_the_disk_ends_the_stream_it_strikes_and_no_other(small):
    broken = threading.Event()

    def fail(module, args, kwargs):
        if broken.is_set() and int(kwargs["position_ids"].max()) > 1000:
            raise OSError(5, "Input/output error")

    hook = small.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        with serving(small) as client:
            struck = {**LONG, "messages": user("x" * 1000), "stream": True}
            spared = {**LONG, "max_tokens": 300, "stream": True}
            with (
                client.stream("POST", CHAT, json=struck) as first,
                client.stream("POST", CHAT, json=spared) as second,
            ):
                coming, going_on = begin(first), begin(second)
                broken.set()
                *_, last = coming
                assert "Input/output error" in last["error"]["message"]
                assert last["error"]["type"] == "server_error"
                assert last["error"]["request_id"] == first.headers["x-request-id"]
                *_, done = going_on
                assert done == "[DONE]"
            whole = refused(client, 500, CHAT, {**HELLO, "messages": user("x" * 1000)})
            assert "Input/output error" in whole["message"]
            broken.clear()
            assert client.post(CHAT, json={**HELLO, "messages": user("x" * 1000)}).status_code == 200
            assert client.get("/health").json() == {"status": "ok"}
            figures = client.get("/metrics").text
            assert 'moeflow_answers_total{reason="error"} 2.0' in figures
    finally:
        hook.remove()


def test_a_model_that_is_closed_ends_its_streams_and_is_told(speaking_folder):
    from transformers import AutoTokenizer

    model = load_moe(speaking_folder, device="cpu", expert_memory="50%", step="python")
    tokenizer = AutoTokenizer.from_pretrained(speaking_folder)
    with serving(model, tokenizer) as client:
        assert client.get("/health").json() == {"status": "ok"}
        with client.stream("POST", CHAT, json={**LONG, "max_tokens": 200, "stream": True}) as response:
            coming = begin(response)
            model.moeflow.close()
            *_, last = coming
        if last != "[DONE]":  # it may have come to its end before
            assert last["error"]["code"] == "closed"
        assert refused(client, 503, CHAT, HELLO)["code"] == "closed"
        response = client.get("/health")
        assert (response.status_code, response.json()) == (503, {"status": "closed"})


def test_figures_of_a_model_with_experts_on_disk(speaking_folder):
    from transformers import AutoTokenizer

    model = load_moe(speaking_folder, device="cpu", expert_memory="50%", step="python")
    with model.moeflow, serving(model, AutoTokenizer.from_pretrained(speaking_folder)) as client:
        client.post(CHAT, json={**HELLO, "max_tokens": 8})
        told = client.get("/stats?experts=1").json()
        assert told["engine"]["new_tokens"] == 8
        assert told["model"]["decode"]["misses"] + told["model"]["prefill"]["misses"] > 0
        rows = told["experts"]
        assert [len(row) for row in rows] == [8, 8, 8]
        assert {value for row in rows for value in row} == {0, 1}
        assert sum(map(sum, rows)) <= 12, "half of 24 experts"
        assert "experts" not in client.get("/stats").json()
        assert refused(client, 405, "/stats", {})
        assert client.get("/stats?experts=2").status_code == 400
        figures = client.get("/metrics").text
        for line in (
            'moeflow_answers_total{reason="length"} 1.0', "moeflow_time_to_first_token_seconds_count 1.0",
            "moeflow_time_per_token_seconds_count 1.0", "moeflow_generated_tokens_total 8.0",
            "moeflow_requests_running 0.0", 'moeflow_expert_misses_total{phase="decode"}',
            'moeflow_expert_bytes_total{phase="prefill",tier="disk"}', "moeflow_kv_budget_bytes",
        ):  # fmt: skip
            assert line in figures


def test_requests_beyond_the_queue_are_asked_to_come_again(small):
    with serving(small, max_batch_size=1, max_waiting=1) as client:
        with client.stream("POST", CHAT, json={**LONG, "n": 2, "stream": True}) as response:
            coming = begin(response)
            error = refused(client, 429, CHAT, HELLO)
            assert (error["type"], error["code"]) == ("rate_limit_error", "too_many_requests")
            assert int(client.post(CHAT, json=HELLO).headers["retry-after"]) >= 1
            coming.close()
        until(lambda: client.post(CHAT, json=HELLO).status_code == 200)
        assert "3 answers" in refused(client, 400, CHAT, {**HELLO, "n": 3})["message"]


def started(model):
    service = Service(ServerSettings())
    service.open(model, letter_tokenizer())
    return service


async def read_and_answered(service, letters):
    """Have a prompt read in the tokenizer's thread, and wait for its answer of eight tokens."""
    ids = await service.read(lambda: service.model.encode_text(letters))
    answers = service.submit([Asked(ids, SamplingParams(max_new_tokens=8, ignore_eos=True))])
    async for _ in answers.outputs():
        pass


def test_requests_that_come_together_begin_in_one_pass(small, monkeypatch):
    monkeypatch.setattr("moeflow.server.worker._GATHERING_S", 60)  # a busy machine reads slowly
    service = started(small)

    async def ask():
        await asyncio.gather(*(read_and_answered(service, letter) for letter in "abcdefghijklmnop"))

    try:
        for round in range(1, 4):
            asyncio.run(ask())
            assert service.figures["engine"]["steps"] == 8 * round
    finally:
        service.close()


def test_a_request_does_not_wait_for_one_that_is_read_for_long(small):
    service, read = started(small), threading.Event()

    async def ask():
        reading = asyncio.create_task(service.read(read.wait))
        ids = service.model.encode_text("hello")
        async for _ in service.submit([Asked(ids, SamplingParams(max_new_tokens=8))]).outputs():
            pass
        read.set()
        assert await reading

    try:
        asyncio.run(asyncio.wait_for(ask(), 60))
    finally:
        read.set()
        service.close()


def test_requests_of_a_loop_that_ends_are_taken_and_the_next_are_answered(small):
    service = started(small)

    async def leave():
        service.submit([Asked([1, 2, 3], SamplingParams(max_new_tokens=8))])

    try:
        for _ in range(3):
            asyncio.run(leave())
        asyncio.run(read_and_answered(service, "hello"))
        until(lambda: not service.num_under_way)
    finally:
        service.close()


@pytest.mark.parametrize(("most", "steps"), [(None, 4), (32, 7)])
def test_a_prompt_is_cut_to_the_tokens_of_a_step(small, most, steps):
    with serving(small, max_step_tokens=most) as client:
        client.post(TEXT, json={"prompt": "x" * 100, "max_tokens": 4, "ignore_eos": True})
        assert counts(client)["steps"] == steps


def test_the_event_loop_says_what_processor_time_it_has_taken(small):
    with serving(small) as client:
        before = client.get("/stats").json()["http"]["cpu_s"]
        assert before > 0
        client.post(TEXT, json={"prompt": "hello", "max_tokens": 8})
        after = client.get("/stats").json()["http"]["cpu_s"]
        assert after > before


def test_at_the_end_running_answers_finish_and_new_ones_are_refused(small):
    with serving(small) as client:
        with client.stream("POST", CHAT, json={**LONG, "max_tokens": 300, "stream": True}) as response:
            coming = begin(response)
            assert client.app.state.service.drain(60)
            *_, done = coming
            assert done == "[DONE]"
        assert refused(client, 503, CHAT, HELLO)["code"] == "stopping"
        assert client.get("/health").json() == {"status": "closed"}


@pytest.mark.parametrize("stream", [True, False])
def test_answers_that_do_not_finish_in_time_end_with_an_error(small, stream):
    with serving(small) as client:
        if stream:
            with client.stream("POST", CHAT, json={**LONG, "stream": True}) as response:
                coming = begin(response)
                assert not client.app.state.service.drain(0)
                *_, last = coming
        else:
            answers = []
            thread = threading.Thread(target=lambda: answers.append(client.post(CHAT, json=LONG)))
            thread.start()
            until(lambda: counts(client)["running"] == 1)
            assert not client.app.state.service.drain(0)
            thread.join()
            assert answers[0].status_code == 503
            last = answers[0].json()
        assert last["error"]["code"] == "stopping"
        until(lambda: client.app.state.service.figures["engine"]["running"] == 0)


def test_an_application_that_ends_leaves_no_thread(small):
    before = set(threading.enumerate())
    with serving(small) as client:
        client.post(CHAT, json=HELLO)
        assert {thread.name for thread in set(threading.enumerate()) - before} >= {"moeflow-server", "moeflow-http"}
    assert {thread.name for thread in set(threading.enumerate()) - before} <= {"asyncio_0"}


def test_a_conversation_outlasts_the_server(tmp_path):
    body = {"messages": user("hello there, how are you today?"), "max_tokens": 4}
    cached = []
    for _ in range(2):
        with serving(small_model(), kv_disk=str(tmp_path / "kept")) as client:
            answer = client.post(CHAT, json=body).json()
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            text = answer["choices"][0]["message"]["content"]
            client.app.state.service.close()
    assert cached[0] == 0
    assert cached[1] == answer["usage"]["prompt_tokens"] - 1
    assert text


def test_conversations_that_left_for_a_disk_come_back_to_the_next_server(tmp_path):
    body = {"messages": user("hello there, how are you today?"), "max_tokens": 4}
    kept = {"kept_folder": str(tmp_path), "kept_disk": "1MiB"}
    with serving(small_model(), kv_memory=40_000, **kept) as client:
        answer = client.post(CHAT, json=body).json()
        until(lambda: list(tmp_path.glob("*/*.run")))
    with serving(small_model(), **kept) as client:
        again = client.post(CHAT, json=body).json()
        assert again["choices"] == answer["choices"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == answer["usage"]["prompt_tokens"] - 1


def test_kept_keys_and_values_that_cannot_be_saved_do_not_keep_a_server_from_ending(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with serving(small_model(), kv_disk=str(tmp_path / "file" / "kept")) as client:
        assert client.post(CHAT, json={"messages": user("hello there"), "max_tokens": 2}).status_code == 200
        client.app.state.service.close()
    assert "not saved" in caplog.text
