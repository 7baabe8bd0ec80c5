"""Messages that show images: the tokens of transformers' own generate, conversations that are kept, and refusals."""

import base64
import io
import json
import struct
import threading
import zlib

import pytest
import torch
from PIL import Image

from helpers.servers import CHAT, events, finished, refused, serving, streamed, until, user
from helpers.small_tokenizers import byte_tokenizer
from helpers.vision_models import data_url, image_part, picture, vision_model
from moeflow import load_moe

LETTERS = 12
GREEDY = {"max_tokens": LETTERS, "ignore_eos": True, "temperature": 0, "skip_special_tokens": False}
ONE = data_url(picture(0))


def image(url=ONE, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


def shows(*images, text="see"):
    """Messages of a user with a text and images."""
    return [{"role": "user", "content": [{"type": "text", "text": text}, *map(image_part, images)]}]


def said(client, messages, **more):
    response = client.post(CHAT, json={**GREEDY, "messages": messages, **more})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


class Served:
    """A vision model behind a server, its experts on disk, and the same model as transformers runs it."""

    def __init__(self, client, model, whole, processor):
        self.client, self.model, self.whole, self.processor = client, model, whole, processor

    def generated(self, *messages):
        """Return what generate says, for roles and contents with images of Pillow."""
        turns = [{"role": role, "content": content} for role, content in messages]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = self.processor.apply_chat_template(turns, **options)
        size = inputs["input_ids"].shape[1]
        made = self.whole.generate(**inputs, max_new_tokens=LETTERS, do_sample=False, eos_token_id=None, pad_token_id=0)
        return self.processor.tokenizer.decode(made[0, size:]), size


def parts(*images, text="see"):
    return [{"type": "text", "text": text}, *({"type": "image", "image": one} for one in images)]


@pytest.fixture(scope="module", params=["qwen3_vl_moe", "glm4v_moe", "ernie4_5_vl_moe"])
def served(request, tmp_path_factory):
    whole, processor = vision_model(request.param)
    with torch.no_grad():
        whole.get_output_embeddings().weight[95:] = 0  # it says letters, each of which is a token
    folder = tmp_path_factory.mktemp("model")
    whole.save_pretrained(folder)
    step = "auto" if request.param == "qwen3_vl_moe" else "python"
    model = load_moe(folder, expert_memory="40%", dtype="float32", step=step)
    with model.moeflow, serving(model, processor, kv_memory="8MiB") as client:
        yield Served(client, model, whole, processor)


def test_greedy_answers_are_those_of_generate_whole_and_streamed(served):
    shown = picture(0), picture(1, 24, 56)
    expected, num_tokens = served.generated(("user", parts(*shown)))
    other, other_tokens = served.generated(("user", parts(picture(2))))
    assert expected != other, "the images matter"
    response = served.client.post(CHAT, json={**GREEDY, "messages": shows(*shown)}).json()
    assert response["choices"][0]["message"]["content"] == expected
    assert response["usage"]["prompt_tokens"] == num_tokens
    if served.model.moeflow.step is not None:
        steps = served.model.moeflow.stats()["step"]
        assert (steps["mode"], steps["reason"]) == ("native", None)
    body = {**GREEDY, "messages": shows(picture(2)), "stream_options": {"include_usage": True}}
    *chunks, last, done = streamed(served.client, CHAT, body)
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == other
    assert (last["usage"]["prompt_tokens"], done) == (other_tokens, "[DONE]")


def test_a_next_turn_goes_on_with_what_is_kept_and_only_with_its_own_images(served):
    own, other = picture(3), picture(4)
    answers, steps = {}, {}
    for name, shown in (("own", own), ("other", other)):
        answers[name] = said(served.client, shows(shown, text="turns"))
    for name, shown in (("other", other), ("own", own)):
        # The same tokens but for the images: what the second conversation left must not be taken for the first.
        turns = [*shows(shown, text="turns"), {"role": "assistant", "content": answers["own"]}, *user("more")]
        response = served.client.post(CHAT, json={**GREEDY, "messages": turns}).json()
        steps[name] = response["usage"]["prompt_tokens_details"]["cached_tokens"]
        expected, _ = served.generated(
            ("user", parts(shown, text="turns")), ("assistant", answers["own"]), ("user", "more")
        )
        assert response["choices"][0]["message"]["content"] == expected
    assert answers["own"] != answers["other"]
    assert steps["own"] > 0
    assert steps["other"] == 0
    again = served.client.post(CHAT, json={**GREEDY, "messages": [*turns[:2], *shows(other)]}).json()
    expected, _ = served.generated(
        ("user", parts(own, text="turns")), ("assistant", answers["own"]), ("user", parts(other))
    )
    assert again["choices"][0]["message"]["content"] == expected, "a new image in a later turn"


def test_texts_and_images_are_answered_beside_each_other(served):
    texts = [f"text number {number}" for number in range(3)]
    expected = {text: served.generated(("user", text))[0] for text in texts}
    seen, _ = served.generated(("user", parts(picture(5))))
    found = {}
    threads = [
        threading.Thread(target=lambda text=text: found.update({text: said(served.client, user(text))}))
        for text in texts
    ]
    threads.append(threading.Thread(target=lambda: found.update(seen=said(served.client, shows(picture(5))))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {**expected, "seen": seen}


def test_answers_are_bound_and_call_tools_with_images():
    model, processor = vision_model("qwen3_vl_moe", byte_tokenizer, 300)
    properties = {"n": {"enum": [1, 2]}}
    schema = {"type": "object", "properties": properties, "required": ["n"], "additionalProperties": False}
    body = {"temperature": 0, "messages": shows(picture(0)), "max_tokens": 200}
    with serving(model, processor) as client:
        bound = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        (answer,) = client.post(CHAT, json={**body, "response_format": bound}).json()["choices"]
        tool = {"type": "function", "function": {"name": "look", "parameters": schema}}
        more = {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "look"}}}
        *chunks, _ = streamed(client, CHAT, {**body, **more})
    assert json.loads(answer["message"]["content"])["n"] in (1, 2)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert [call["function"]["name"] for call in calls] == ["look"]
    assert json.loads(calls[0]["function"]["arguments"])["n"] in (1, 2)


@pytest.fixture(scope="module")
def one():
    """A server of one vision model, whole in memory."""
    model, processor = vision_model("qwen3_vl_moe")
    limits = {"max_images": 3, "max_image_bytes": 100_000, "max_image_pixels": 200 * 200}
    with serving(model, processor, kv_memory="4MiB", **limits) as client:
        yield client


def test_other_forms_show_the_same_images(one):
    expected = said(one, [{"role": "user", "content": [{"type": "text", "text": "see"}, image()]}])
    settings = {"temperature": 0, "model": "org/tiny"}
    content = [{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": ONE, "detail": "auto"}]
    body = {**settings, "input": [{"role": "user", "content": content}], "max_output_tokens": LETTERS}
    made = one.post("/v1/responses", json=body)
    assert made.status_code == 200, made.text
    (part,) = made.json()["output"][-1]["content"]
    source = {"type": "base64", "media_type": "image/png", "data": ONE.partition(",")[2]}
    content = [{"type": "text", "text": "see"}, {"type": "image", "source": source}]
    body = {**settings, "messages": [{"role": "user", "content": content}], "max_tokens": LETTERS}
    message = one.post("/v1/messages", json=body)
    assert message.status_code == 200, message.text
    (block,) = message.json()["content"]
    assert block["text"] == part["text"] != ""
    assert expected.startswith(part["text"][:4])
    counted = one.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
    assert counted == message.json()["usage"]["input_tokens"] == made.json()["usage"]["input_tokens"] > 20


@pytest.mark.parametrize(
    ("kind", "options"),
    [("webp", {"lossless": True}), ("gif", {}), ("jpeg", {"quality": 100})],
)
def test_formats_are_read_and_of_a_moving_image_the_first(one, kind, options):
    flat = Image.new("RGB", (40, 24), (255, 0, 0))
    if kind == "gif":
        options = {"save_all": True, "append_images": [picture(7)]}
    same = [{"role": "user", "content": [image(data_url(flat, kind, **options))]}]
    assert said(one, same) == said(one, [{"role": "user", "content": [image(data_url(flat))]}])


def bomb(width=60_000, height=60_000):
    """A PNG that says it is huge."""
    file = io.BytesIO()
    picture(0).save(file, "png")
    head = bytearray(file.getvalue())
    head[16:24] = struct.pack(">II", width, height)
    head[29:33] = struct.pack(">I", zlib.crc32(bytes(head[12:29])))
    return "data:image/png;base64," + base64.b64encode(bytes(head)).decode()


HEAD = "data:image/png;base64,"
CUT = HEAD + ONE.removeprefix(HEAD)[:400]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([image("http://127.0.0.1:9/a.png")], "fetches nothing"),
        ([image("https://example.org/a.png")], "fetches nothing"),
        ([image("file:///etc/passwd")], "fetches nothing"),
        ([image("/etc/passwd")], "fetches nothing"),
        ([image("data:image/png,abc")], "fetches nothing"),
        ([image("data:image/png;base64,@@@@")], "not base64"),
        ([image("data:image/png;base64,")], "broken or none"),
        ([image("data:image/png;base64,aGVsbG8=")], "broken or none"),
        ([{"type": "text", "text": "a"}, image(CUT)], "part 2 of message 1 that is broken"),
        ([image(data_url(picture(0), "bmp"))], "PNG, JPEG, WebP or GIF"),
        ([image(bomb())], "too many pixels"),
        ([image(bomb(300, 200))], "300 x 200 pixels"),
        ([image(data_url(picture(0, 180, 180))), image(data_url(picture(1, 180, 180)))], "40,000 pixels at most"),
        ([image("data:image/png;base64," + "A" * 140_000)], "bytes as part 1 of message 1"),
        ([image()] * 4, "more than 3 images"),
        ([image(detail="best")], "the detail 'best'"),
        ([image(size=3)], "has 'size'"),
        ([{**image(), "cache": 1}], "has 'cache'"),
        ([{"type": "image_url", "image_url": ONE[:40]}], 'must be {"url"'),
        ([{"type": "image_url"}], "image_url of part 1 of message 1"),
        ([{"type": "input_audio", "input_audio": {}}], "only text parts"),
        ([{"type": "text", "text": "<|image_pad|>"}, image()], "refuses this conversation"),
        ([image(data_url(picture(0, 1000, 2)))], "refuses this conversation"),
        ([{"type": "text", "text": "x" * 3000}, image()], "context"),
    ],
)
def test_what_is_wrong_with_an_image_is_named(one, content, told):
    errors = finished(one, "error")
    assert told in refused(one, 400, CHAT, {"messages": [{"role": "user", "content": content}]})["message"]
    assert finished(one, "error") == errors, "the engine has not seen it"


def test_images_elsewhere_are_refused(one):
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "a", "content": [image()]}
    for messages, told in (
        ([{"role": "system", "content": [image()]}, *user("a")], "in messages of a user"),
        ([*user("a"), {"role": "assistant", "content": [image()]}, *user("a")], "in messages of a user"),
        ([*user("a"), {"role": "assistant", "tool_calls": [call]}, result], "in a message of a user"),
    ):
        assert told in refused(one, 400, CHAT, {"messages": messages})["message"]
    body = {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}]}
    assert "no files are stored" in refused(one, 400, "/v1/responses", body)["message"]
    source = {"type": "url", "url": "https://example.org/a.png"}
    body = {"messages": [{"role": "user", "content": [{"type": "image", "source": source}]}], "max_tokens": 1}
    assert "fetches nothing" in one.post("/v1/messages", json=body).json()["error"]["message"]


def test_a_model_without_images_says_so(client):
    message = refused(client, 400, CHAT, {"messages": shows(picture(0))})["message"]
    assert "reads no images: it is served without a processor" in message


def test_a_model_whose_vision_tower_is_not_loaded_says_so(small):
    _, processor = vision_model("qwen3_vl_moe")
    with serving(small, processor) as client:
        assert said(client, user("hello"))
        message = refused(client, 400, CHAT, {"messages": shows(picture(0))})["message"]
    assert "MixtralForCausalLM, which takes text alone" in message


def test_images_under_way_take_no_more_memory_than_is_allowed(one):
    held = data_url(picture(0, 32, 32))
    body = {**GREEDY, "messages": [{"role": "user", "content": [image(held)]}]}
    with (
        serving(*vision_model("qwen3_vl_moe"), kv_memory="4MiB", max_images_memory=40_000) as client,
        client.stream("POST", CHAT, json={**body, "stream": True, "max_tokens": 900}) as response,
    ):
        coming = events(response)
        next(coming)
        other = {**body, "messages": [{"role": "user", "content": [image(held)]}]}
        error = refused(client, 429, CHAT, other)
        assert error["code"] == "too_many_requests"
        assert said(client, user("a text"))
        response.close()
        until(lambda: client.post(CHAT, json=other).status_code == 200)


def test_a_model_that_fails_on_images_fails_that_request_alone(one, monkeypatch):
    model = one.app.state.service._model._model

    def broken(*args, **kwargs):
        raise ValueError("the tower fell")

    with monkeypatch.context() as patched:
        patched.setattr(model.model.visual, "forward", broken)
        response = one.post(CHAT, json={**GREEDY, "messages": shows(picture(8))})
    assert response.status_code == 500
    assert "the tower fell" in response.json()["error"]["message"]
    assert said(one, shows(picture(8)))
