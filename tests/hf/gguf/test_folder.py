"""A GGUF file's folder is made whole or not at all, once, and holds what the file and the model's own files tell."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from transformers import AutoTokenizer

from helpers.full_disk import with_full_disk
from helpers.gguf_tokenizers import tokenizer_metadata, varied_texts, write_gguf
from helpers.kill_points import kill_at_each_line
from helpers.small_tokenizers import byte_tokenizer
from moeflow import file_lock
from moeflow.errors import CheckpointError, ConfigError, UnsupportedModelError
from moeflow.hf.files.config import load_config
from moeflow.hf.gguf import folder as module
from moeflow.hf.gguf.folder import gguf_folder

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def metadata(**more):
    """A small Qwen3's, with a token for each byte and three special ones."""
    own = byte_tokenizer(additional_special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"]).backend_tokenizer
    keys = {
        "context_length": 512, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16,
        "attention.value_length": 16, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0,
        "expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32,
    }  # fmt: skip
    return {
        **{f"qwen3moe.{key}": value for key, value in keys.items()},
        **tokenizer_metadata(own, "gpt-2", special={"eos": 257}),
        "tokenizer.ggml.merges": None,
        "tokenizer.chat_template": TEMPLATE,
        **more,
    }


def written(path, *, dtype=np.float16, architecture="qwen3moe", **more):
    """A real GGUF file of two tensors."""
    path.parent.mkdir(exist_ok=True)
    fields = {key: value for key, value in metadata(**more).items() if value is not None}
    tensors = {"token_embd.weight": np.zeros((259, 64), dtype), "output_norm.weight": np.zeros(64, np.float32)}
    return write_gguf(path, fields, tensors, architecture)


@pytest.fixture
def file(tmp_path):
    return written(tmp_path / "models" / "small.gguf")


def fields_of(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def test_the_folder_is_a_model_folder(file, cache):
    folder = gguf_folder(file)
    config = load_config(folder)
    assert (config.model_type, config.num_experts, config.hidden_size, config.vocab_size) == ("qwen3_moe", 8, 64, 259)
    assert fields_of(folder)["dtype"] == "float16"
    tokenizer, own = AutoTokenizer.from_pretrained(folder), byte_tokenizer()
    for text in varied_texts(50):
        assert tokenizer(text)["input_ids"] == own(text)["input_ids"]
    assert (tokenizer.eos_token, tokenizer.chat_template, tokenizer.model_max_length) == ("<|im_end|>", TEMPLATE, 512)
    assert fields_of(folder, "generation_config.json") == {"eos_token_id": [257, 258]}
    told = {"version": 1, "files": [str(file.absolute())], "sizes": [file.stat().st_size]}
    assert fields_of(folder, "gguf.json") == told
    assert folder.parent == cache
    assert folder.name.startswith("small-")
    assert os.listdir(cache) == [folder.name]


def test_a_second_call_finds_the_folder_and_writes_nothing(file, monkeypatch):
    before = gguf_folder(file)
    times = {path: path.stat().st_mtime_ns for path in before.iterdir()}
    monkeypatch.chdir(file.parent)
    os.utime(file)  # other weights of the same size and headers have the same folder
    assert gguf_folder(file) == gguf_folder(type(file)(file.name)) == before
    assert {path: path.stat().st_mtime_ns for path in before.iterdir()} == times


def test_another_header_another_place_and_other_files_beside_have_folders_of_their_own(file, tmp_path):
    first = gguf_folder(file)
    folders = {first, gguf_folder(written(file, **{"qwen3moe.context_length": 1024}))}
    shutil.copy(written(file), tmp_path / "small.gguf")
    folders |= {gguf_folder(file), gguf_folder(tmp_path / "small.gguf")}
    (tmp_path / "chat_template.jinja").write_text("x")
    folders.add(gguf_folder(tmp_path / "small.gguf"))
    assert len(folders) == 4
    assert fields_of(first)["max_position_embeddings"] == 512


def test_calls_at_once_make_one_folder(file, cache):
    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(gguf_folder, [file] * 4))) == 1
    assert len(os.listdir(cache)) == 1


@pytest.mark.parametrize(("dtype", "named"), [(np.float16, "float16"), (np.float32, "float32")])
def test_floats_are_computed_in_their_own_dtype(tmp_path, dtype, named):
    assert fields_of(gguf_folder(written(tmp_path / "x.gguf", dtype=dtype)))["dtype"] == named


def test_blocks_are_computed_in_bfloat16(tmp_path):
    import gguf

    fields = {key: value for key, value in metadata().items() if value is not None}
    blocks = gguf.quantize(np.zeros((259, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    path = write_gguf(tmp_path / "q.gguf", fields, {"token_embd.weight": blocks}, types={"token_embd.weight": "Q8_0"})
    assert fields_of(gguf_folder(path))["dtype"] == "bfloat16"


def test_generation_ends_where_the_file_and_the_names_of_tokens_say(tmp_path):
    words = ["<|return|>", "<|call|>", "<|end|>", "<|endoftext|>", "<|other|>"]
    own = byte_tokenizer(additional_special_tokens=words).backend_tokenizer
    changed = tokenizer_metadata(own, "gpt-2", special={"eos": 259, "bos": 260, "padding": 259, "eot": 257})
    changed["tokenizer.ggml.merges"] = None
    drawn = {"general.sampling.temp": 0.6, "general.sampling.top_k": 20}
    folder = gguf_folder(written(tmp_path / "x.gguf", **changed, **drawn))
    told = {"eos_token_id": [259, 256, 257], "bos_token_id": 260, "pad_token_id": 259}  # "<|end|>" ends a part
    drawn = {"do_sample": True, "temperature": 0.6, "top_k": 20}
    assert fields_of(folder, "generation_config.json") == told | drawn
    greedy = gguf_folder(written(tmp_path / "x.gguf", **changed, **{"general.sampling.temp": 0.0}))
    assert fields_of(greedy, "generation_config.json") == told | {"do_sample": False}


def test_the_models_own_files_win_those_of_the_given_folder_first(file, tmp_path):
    quantized = {"quantization_config": {"quant_method": "fp8"}}
    beside = {"model_type": "qwen3_moe", "hidden_size": 1, **quantized, "text_config": {"a": 1, **quantized}}
    (file.parent / "config.json").write_text(json.dumps(beside))
    (file.parent / "generation_config.json").write_text('{"eos_token_id": 7}')
    folder = gguf_folder(file)
    assert fields_of(folder) == {"model_type": "qwen3_moe", "hidden_size": 1, "text_config": {"a": 1}}
    assert fields_of(folder, "generation_config.json") == {"eos_token_id": 7}
    given = tmp_path / "own"
    given.mkdir()
    (given / "config.json").write_text('{"model_type": "qwen3_moe", "hidden_size": 2}')
    assert fields_of(gguf_folder(file, config=given))["hidden_size"] == 2
    assert fields_of(gguf_folder(file))["hidden_size"] == 1


def test_a_tokenizer_of_the_models_own_wins_and_lacks_nothing(tmp_path):
    file = written(tmp_path / "x.gguf", **{"tokenizer.ggml.pre": "not-known"})
    with pytest.raises(UnsupportedModelError, match="'not-known'"):
        gguf_folder(file)
    own = byte_tokenizer(additional_special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"], bos_token="a")
    own.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    alone = AutoTokenizer.from_pretrained(gguf_folder(file))
    assert (alone.eos_token, alone.chat_template, alone("hi")) == ("<|im_end|>", TEMPLATE, own("hi"))
    own.save_pretrained(tmp_path / "own")
    whole = AutoTokenizer.from_pretrained(gguf_folder(file, config=tmp_path / "own"))
    assert (whole.bos_token, whole.eos_token, whole.chat_template) == ("a", None, TEMPLATE)
    own.chat_template = "own"
    own.save_pretrained(tmp_path / "own")
    assert AutoTokenizer.from_pretrained(gguf_folder(file, config=tmp_path / "own")).chat_template == "own"
    (tmp_path / "own" / "chat_template.jinja").unlink()
    config = tmp_path / "own" / "tokenizer_config.json"  # as older versions of transformers have it
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": "inside"}))
    assert AutoTokenizer.from_pretrained(gguf_folder(file, config=tmp_path / "own")).chat_template == "inside"
    (tmp_path / "chat_template.jinja").write_text("beside")
    assert AutoTokenizer.from_pretrained(gguf_folder(file)).chat_template == "beside"


def test_named_templates_come_through(tmp_path):
    named = {"tokenizer.chat_templates": ["tools"], "tokenizer.chat_template.tools": "{{ tools }}"}
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder(written(tmp_path / "x.gguf", **named)))
    assert tokenizer.chat_template == {"default": TEMPLATE, "tools": "{{ tools }}"}


@pytest.mark.parametrize(
    ("more", "error", "told"),
    [
        ({"qwen3moe.expert_count": None}, UnsupportedModelError, r"is a dense model \(qwen3moe.*llama\.cpp"),
        ({"qwen3moe.embedding_length": None}, CheckpointError, r"must have qwen3moe\.embedding_length.*--config"),
    ],
)
def test_what_cannot_be_a_model_is_refused_and_nothing_is_left(tmp_path, cache, more, error, told):
    with pytest.raises(error, match=told):
        gguf_folder(written(tmp_path / "x.gguf", **more))
    assert not cache.exists() or not os.listdir(cache)


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    file = written(tmp_path / "x.gguf", architecture="mammoth", **{"mammoth.expert_count": 8})
    with pytest.raises(UnsupportedModelError, match="mammoth"):
        gguf_folder(file)


def test_a_folder_without_the_models_own_files_is_refused(file, tmp_path):
    with pytest.raises(ConfigError, match=r"has neither config\.json nor tokenizer\.json"):
        gguf_folder(file, config=tmp_path)


def test_a_cache_that_cannot_be_written_is_told(file, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "taken"))
    with pytest.raises(ConfigError, match=r"cannot be written.*MOEFLOW_CACHE"):
        gguf_folder(file)


def test_a_full_disk_is_told_and_leaves_nothing(file, cache):
    def call():
        with pytest.raises(ConfigError, match="cannot be written"):
            gguf_folder(file)

    for num_bytes in (100, 1000, 3000):
        assert with_full_disk(num_bytes, call) == 0
        assert os.listdir(cache) == []


@pytest.mark.slow
def test_a_kill_at_any_line_leaves_nothing_half_made(file, cache):
    whole = gguf_folder(file)
    contents = {path.name: path.read_bytes() for path in whole.iterdir()}
    shutil.rmtree(cache)
    for place in kill_at_each_line(lambda: gguf_folder(file), module, file_lock):
        made = gguf_folder(file)
        assert {path.name: path.read_bytes() for path in made.iterdir()} == contents, place
        assert [name for name in os.listdir(cache) if not name.endswith(".lock")] == [made.name], place
        shutil.rmtree(cache)
