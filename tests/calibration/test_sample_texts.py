"""Prompts of calibration in the model's chat template, whatever form it wants."""

import pytest

from helpers.small_tokenizers import byte_tokenizer
from moeflow.calibration.sample_texts import CHAT_REQUESTS, TOPICS, calibration_prompts
from moeflow.errors import MoeflowError


def test_requests_are_in_the_prompts_of_a_template_that_walks_over_parts():
    tokenizer = byte_tokenizer(chat_template="{% for p in messages[0].content %}{{ p.text }}{% endfor %}")
    prompts = [tokenizer.decode(ids) for ids in calibration_prompts(tokenizer, 4, seed=0)]
    asked = {request.format(topic=topic) for request in CHAT_REQUESTS for topic in TOPICS}
    assert [prompt in asked for prompt in prompts] == [True, False, True, False]


def test_a_template_that_fails_is_a_named_error():
    with pytest.raises(MoeflowError, match="chat template refuses"):
        calibration_prompts(byte_tokenizer(chat_template="{{ 1 + 'a' }}"), 2, seed=0)
