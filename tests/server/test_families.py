"""A family that packed passes cannot run is served one sequence at a time, its conversations kept."""

import torch

from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.servers import CHAT, serving, streamed, user
from helpers.small_tokenizers import letter_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }} {% endfor %}assistant:"


def test_turns_of_a_conversation_are_answered_and_go_on_with_what_is_kept():
    model = build_model(FAMILIES["qwen3_next"])
    with torch.no_grad():
        model.lm_head.weight[95:] = 0  # it says letters
    model.config.max_position_embeddings = 256
    body = {"messages": user("hello"), "max_tokens": 6, "ignore_eos": True}
    with serving(model, letter_tokenizer(chat_template=TEMPLATE), kv_memory="1MiB") as client:
        first = client.post(CHAT, json=body).json()
        text = first["choices"][0]["message"]["content"]
        turns = [*body["messages"], {"role": "assistant", "content": text}, *user("more")]
        second = client.post(CHAT, json={**body, "messages": turns}).json()
        *_, done = streamed(client, CHAT, {**body, "messages": user("other")})
        stats = client.get("/stats").json()["engine"]
    assert done == "[DONE]"
    assert (first["usage"]["completion_tokens"], second["usage"]["completion_tokens"]) == (6, 6)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == first["usage"]["prompt_tokens"] + 5
    assert stats["kept_hits"] == 1
