"""A small model that chats, its folder and its tokenizer."""

from string import ascii_lowercase

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from helpers.small_tokenizers import byte_tokenizer
from helpers.terminal import DRIVER, ENDLESS

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that says small letters and spaces without end."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer(eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=2 * ENDLESS,
        eos_token_id=tokenizer.eos_token_id, initializer_range=0.5,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    sayable = {tokenizer(char)["input_ids"][0] for char in ascii_lowercase + " "}
    with torch.no_grad():  # no setting of `generate`, which the engine would not obey
        model.lm_head.weight[[token for token in range(len(tokenizer)) if token not in sayable]] = 0
    model.save_pretrained(folder)
    (folder / "driver.py").write_text(DRIVER)
    return folder


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)
