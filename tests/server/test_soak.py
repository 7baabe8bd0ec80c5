"""A small soak: clients of all kinds, whose answers are right and of whom nothing is left."""

import pytest

from bench.server.soak import KINDS, soak
from helpers.servers import small_model
from helpers.small_tokenizers import byte_tokenizer


@pytest.mark.slow
def test_answers_are_right_and_nothing_is_left_of_clients_of_all_kinds():
    found = soak(small_model(vocab_size=300), byte_tokenizer(eos_token="<|end|>"), 60, kv_memory=400_000)
    assert found["wrong"] == []
    assert found["left"] == []
    assert sum(found["kinds"].values()) == 60
    assert found["kinds"].keys() == KINDS.keys()
    assert found["checked"] >= found["kinds"]["whole"] + found["kinds"]["stream"]
    assert found["ended"]["cancelled"] > 0, "clients that leave end their requests"
    assert found["bound"] > 0
    assert found["kept_hits"] > 0
