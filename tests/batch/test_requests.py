"""Bad input to `moeflow batch`: each failed line says why, every other one has the answer that `generate` gives."""

import resource
import signal

import pytest

from helpers.batch_command import batch, by_id, write
from helpers.small_tokenizers import letter_tokenizer
from moeflow.checkpoint.packed_file import PACKED_FILE
from moeflow.cli.main import main
from moeflow.convert.pack import pack_model

NEW = 12
POSITION_BYTES = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, features, float32


@pytest.fixture(scope="module")
def whole(mixtral):
    """What `generate` says behind a prompt."""
    tokenizer = letter_tokenizer()

    def text(prompt, num_new=NEW):
        inputs = tokenizer(prompt, return_tensors="pt")
        out = mixtral.generate(**inputs, max_new_tokens=num_new, do_sample=False, eos_token_id=None, pad_token_id=0)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return text


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [(), ("--group-size", 2)], ids=["one pass", "groups"])
def test_each_failed_line_says_why_and_every_other_one_is_answered(speaking_folder, whole, tmp_path, capsys, grouped):
    stop = whole("stopped")[3:6]
    source = write(
        tmp_path / "in.jsonl",
        [
            {"id": "first", "prompt": "first"},
            {"id": "empty", "prompt": ""},
            "not JSON",
            {"id": "context", "prompt": "x" * 257},
            {"id": "first", "prompt": "its id is taken"},
            {"custom_id": "first", "url": "/v1/completions", "body": {"prompt": "and in the other form"}},
            {"id": "memory", "prompt": "too much", "max_new_tokens": 100},
            {"id": "stopped", "prompt": "stopped", "stop": ["no such text", stop]},
            {"id": "large", "prompt": "large", "temperature": 10**30, "seed": 0, "presence_penalty": -(10**30)},
            {"id": "last", "prompt": "last"},
        ],
    )
    out = tmp_path / "out.jsonl"
    memory = ("--kv-memory", 60 * POSITION_BYTES, "--max-new-tokens", NEW, "--ignore-eos")
    assert main(batch(speaking_folder, source, out, *memory, *grouped)) == 1
    lines, told = by_id(out), capsys.readouterr().err
    reasons = {
        "empty": "not empty",
        "#3": "not JSON",
        "context": "the prompt has 257 tokens, the model's context 256 positions",
        "#5": "'first' is that of line 1",
        "#6": "'first' is that of line 1",
        "memory": f"take {107 * POSITION_BYTES:,} bytes, and kv_memory is {60 * POSITION_BYTES:,} bytes",
    }
    for number, (name, reason) in zip((2, 3, 4, 5, 6, 7), reasons.items(), strict=True):
        error = lines.pop(name)["error"]
        message = error if isinstance(error, str) else error["message"]
        assert reason in message
        assert number > 6 or f"line {number}: " in told
    assert "6 of 10 requests" in told
    assert lines.pop("large")["completion_tokens"] == NEW
    assert {name: line["text"] for name, line in lines.items()} == {
        "first": whole("first"),
        "stopped": whole("stopped").split(stop)[0],
        "last": whole("last"),
    }
    assert len(stop) == 3, "it takes three tokens of this tokenizer"
    assert lines["stopped"]["finish_reason"] == "stop"


def test_an_expert_that_cannot_be_read_fails_who_needs_it_until_it_is_there_again(
    speaking_folder, whole, tmp_path, capsys
):
    folder = pack_model(speaking_folder, tmp_path / "packed").folder
    packed = (folder / PACKED_FILE).read_bytes()
    (folder / PACKED_FILE).write_bytes(packed[:-100] + bytes([packed[-100] ^ 1]) + packed[-99:])
    prompts = [letter * 2 for letter in "abcdefghij"]
    source = write(tmp_path / "in.jsonl", [{"id": prompt, "prompt": prompt} for prompt in prompts])
    arguments = batch(folder, source, tmp_path / "out.jsonl", "--max-new-tokens", 2, "--ignore-eos")
    assert main(arguments) == 1
    lines = by_id(tmp_path / "out.jsonl")
    assert sorted(lines) == prompts
    failed = [line for line in lines.values() if "error" in line]
    assert 0 < len(failed) < len(prompts)
    assert all("ExpertReadError" in line["error"] and "is corrupt in" in line["error"] for line in failed)
    assert "--retry-failed tries them again" in capsys.readouterr().err
    (folder / PACKED_FILE).write_bytes(packed)
    assert main([*arguments, "--retry-failed"]) == 0
    again = by_id(tmp_path / "out.jsonl")
    assert {name: line["text"] for name, line in again.items()} == {prompt: whole(prompt, 2) for prompt in prompts}
    assert all(again[name] == line for name, line in lines.items() if "error" not in line)


@pytest.mark.slow
def test_an_output_that_fills_the_disk_in_the_middle_keeps_its_lines_and_goes_on(
    speaking_folder, whole, tmp_path, capsys
):
    """A limit on the file's size makes the system refuse the rest of a line, as a full disk does."""
    prompts = [f"prompt {number}" for number in range(6)]
    source = write(tmp_path / "in.jsonl", [{"id": prompt, "prompt": prompt} for prompt in prompts])
    out = tmp_path / "out.jsonl"
    arguments = batch(speaking_folder, source, out, "--batch-size", 2, "--max-new-tokens", NEW, "--ignore-eos")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
        assert main(arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    kept = out.read_bytes()
    assert kept.endswith(b"\n")
    num_kept = kept.count(b"\n")
    assert 0 < num_kept < len(prompts)
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"cannot be written: File too large. The {num_kept} lines before are kept" in error
    assert main(arguments) == 0
    assert out.read_bytes().startswith(kept)
    assert {name: line["text"] for name, line in by_id(out).items()} == {prompt: whole(prompt) for prompt in prompts}
