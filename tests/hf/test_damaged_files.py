"""Damaged files of a checkpoint: an error of moeflow's, or what transformers makes of them; no question, no hang."""

import contextlib
import json
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from helpers.damaged_json import damaged
from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.small_tokenizers import letter_tokenizer
from moeflow import MoeflowError, load_moe
from moeflow.hf.encoding import encode_messages, encode_text
from moeflow.hf.pretrained import load_tokenizer
from moeflow.loading.describe import describe_model

pytestmark = pytest.mark.slow
IDS = torch.tensor([[3, 4, 5]])
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}a:"
PIECES = (
    "{%", "%}", "{{", "}}", "for m in messages", "endfor", "m", "messages", "['content']", "1/0", "+", "|", "upper",
    "raise_exception('no')", "if", "endif", "[9]", ".x", "\udcff", "'", "range(10**9)",
)  # fmt: skip
SHORT_DTYPE = b'dtype": "bf16"'  # a name that load_moe reads, and transformers does not
ASKED = [{"role": "user", "content": "hi"}]
often = settings(
    max_examples=300,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class _Silent:
    """Standard input on which nothing may be asked."""

    def readline(self, *_args):
        raise AssertionError("a question was asked on standard input")

    read = readline


@pytest.fixture(autouse=True)
def _nothing_is_asked(monkeypatch):
    monkeypatch.setattr(sys, "stdin", _Silent())


@pytest.fixture
def folder(mixtral, tmp_path):
    """A folder that each example damages."""
    mixtral.save_pretrained(tmp_path)
    letter_tokenizer(chat_template=TEMPLATE).save_pretrained(tmp_path)
    return tmp_path


def loaded_as_by_transformers(folder):
    """Load a folder and run it: refused by an error of moeflow's, or equal to transformers, whatever that is."""
    with contextlib.suppress(MoeflowError):
        describe_model(folder)
    try:
        model = load_moe(folder, expert_memory="60%")
    except MoeflowError:
        return
    if SHORT_DTYPE in (folder / "config.json").read_bytes():
        assert model.dtype is torch.bfloat16
        model.moeflow.close()
        return
    own = AutoModelForCausalLM.from_pretrained(
        folder,
        experts_implementation="eager",
        trust_remote_code=False,
        ignore_mismatched_sizes=False,
    )
    with model.moeflow, torch.no_grad():
        try:
            expected = own(IDS).logits
        except Exception as error:
            with pytest.raises((MoeflowError, type(error))):
                model(IDS)
            return
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert model.generation_config.to_dict() == own.generation_config.to_dict()


def test_a_damaged_config_is_refused_or_read_as_by_transformers(folder):
    good = json.loads((folder / "config.json").read_text())

    @often
    @given(damaged(good))
    def check(content):
        (folder / "config.json").write_bytes(content)
        loaded_as_by_transformers(folder)

    check()


def generation_config_of_transformers(folder):
    """Read as a model's from_pretrained reads it: what is no file is left aside for the model's config."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def test_a_damaged_generation_config_is_refused_or_read_as_by_transformers(folder):
    file = folder / "generation_config.json"
    good = json.loads(file.read_text())

    @often
    @given(damaged(good))
    def check(content):
        file.write_bytes(content)
        try:
            model = load_moe(folder, expert_memory="60%")
        except MoeflowError:
            return
        model.moeflow.close()
        assert model.generation_config.to_dict() == generation_config_of_transformers(folder).to_dict()

    check()


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen3_next"])
def test_so_is_that_of_another_family(tmp_path, family):
    build_model(FAMILIES[family]).save_pretrained(tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())

    @often
    @given(damaged(good))
    def check(content):
        (tmp_path / "config.json").write_bytes(content)
        loaded_as_by_transformers(tmp_path)

    check()


def use(tokenizer):
    return encode_text(tokenizer, "ab c"), encode_messages(tokenizer, ASKED), tokenizer.decode([3, 4])


def use_as_transformers(tokenizer):
    asked = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=True)["input_ids"]
    return tokenizer("ab c")["input_ids"], asked, tokenizer.decode([3, 4])


def used_as_by_transformers(folder):
    """Load a folder's tokenizer and use it: refused by an error of moeflow's, or equal to transformers."""
    try:
        found = use(load_tokenizer(folder))
    except MoeflowError:
        return
    assert found == use_as_transformers(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_damaged_tokenizer_is_refused_or_read_as_by_transformers(folder, name):
    file = folder / name
    good = json.loads(file.read_text()) if file.is_file() else {"eos_token": "~", "unk_token": " "}

    @often
    @given(damaged(good))
    def check(content):
        file.write_bytes(content)
        used_as_by_transformers(folder)

    check()


def test_a_damaged_template_is_refused_or_rendered_as_by_transformers(folder):
    file = folder / "chat_template.jinja"

    @often
    @given(
        st.lists(
            st.sampled_from(PIECES),
            max_size=12,
        ),
        st.integers(0, len(TEMPLATE)),
    )  # fmt: skip
    def check(pieces, at):
        file.write_bytes((TEMPLATE[:at] + " ".join(pieces) + TEMPLATE[at:]).encode("utf-8", "surrogatepass"))
        used_as_by_transformers(folder)

    check()
