"""Lines of a batch: requests as people write them, and answers to them."""

import json

from moeflow.batch.openai_format import CHAT_URL
from moeflow.batch.requests import BatchRequest
from moeflow.batch.results import answer_record
from moeflow.engine.request import Completion
from moeflow.engine.sampling_params import SamplingParams

DEFAULTS = SamplingParams(max_new_tokens=7)


def write(path, *lines):
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def openai(custom_id="a", url=CHAT_URL, **body):
    content = {"messages": [{"role": "user", "content": "hi"}]} if url == CHAT_URL else {"prompt": "hi"}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m", **content, **body}}


def request(number=1, url=None, content="hi", **fields):
    return BatchRequest(number, f"id-{number}", url, content, DEFAULTS, **fields)


def completion(text="ok", logprobs=None, prompt_logprobs=None):
    return Completion("", [1, 2, 3], [4, 5], text, "stop", None, logprobs, prompt_logprobs)


def answer(number=1, text="ok"):
    return answer_record(request(number), completion(text), str)


def records(path):
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]
