"""Bad input to load_moe: a clear error that names cause and remedy, nothing leaked, the model still usable."""

import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.paths import ROOT
from helpers.small_models import tiny_mixtral
from moeflow import MoeflowError, load_moe
from moeflow.errors import (
    BudgetError,
    CheckpointError,
    ClosedModelError,
    ConfigError,
    ExpertReadError,
    ModelSourceError,
    UnsupportedModelError,
)

PROMPT = torch.arange(1, 12).unsqueeze(0)
MINIMUM = 3 * 73728  # 2 experts of a token and a read in flight, 64 x 96 x 3 float32 values each


@pytest.fixture
def folder(mixtral_folder, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    return shutil.copytree(mixtral_folder, tmp_path / "model")


@pytest.mark.parametrize("budget", [0, 1000, MINIMUM - 1, "1%", "0%", "100KB"])
def test_budget_below_the_minimum_names_the_minimum_in_bytes(mixtral_folder, budget):
    with pytest.raises(BudgetError, match=f"minimum is {MINIMUM:,} bytes"):
        load_moe(mixtral_folder, expert_memory=budget)


def test_the_minimum_itself_is_enough(mixtral_folder):
    with load_moe(mixtral_folder, expert_memory=MINIMUM).moeflow as runtime:
        assert runtime.stats()["slots"] == 3


@pytest.mark.parametrize("budget", ["lots", "6 gigs", "-1", -5, "101%", None, True, "6Gib", [1], "nan", "25 percent"])
def test_malformed_budget_names_what_is_allowed(mixtral_folder, budget):
    with pytest.raises(ConfigError, match="expert_memory"):
        load_moe(mixtral_folder, expert_memory=budget)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"policy": "best"}, "lru, lfu, lfru, static"),
        ({"device": "gpu"}, "cuda:N"),
        ({"device": "meta"}, "not supported"),
        ({"host_memory": "1GiB", "device": "cpu"}, "Put the memory into expert_memory"),
        ({"miss": "guess"}, "copy, cheapest"),
        ({"miss": "cheapest", "device": "cpu"}, "where both are one"),
        ({"device_map": "auto"}, "device="),
        ({"quantization_config": {"quant_method": "gptq"}}, "read as it is"),
        ({"experts_implementation": "eager"}, "itself"),
        ({"variant": "v2"}, "different files"),
        ({"subfolder": "part"}, "give that folder"),
        ({"torch_dtype": torch.float16}, "it is called dtype"),
        ({"max_memory": {0: "1GB"}}, "expert_memory="),
        ({"offload_folder": "here"}, "own files"),
        ({"use_safetensors": False}, "safetensors only"),
        ({"no_such_option": 1}, "no_such_option: it is no option"),
        ({"attn_implementation": "best"}, "options attn_implementation"),
        ({"generation_config": {"top_k": 5}}, "options generation_config"),
    ],
)
def test_options_that_cannot_be_obeyed_are_refused(mixtral_folder, options, match):
    with pytest.raises(ConfigError, match=match):
        load_moe(mixtral_folder, **options)


@pytest.mark.parametrize(
    "name", ["experts_implementation", "device_map", "quantization_config", "state_dict", "use_safetensors"]
)
def test_an_option_of_from_pretrained_that_is_none_is_not_given(mixtral_folder, name):
    load_moe(mixtral_folder, expert_memory="50%", **{name: None}).moeflow.close()


@pytest.mark.parametrize("model", [None, b"/model", "", 5, "x" * 5000, "a\0b", "~no-such-user/model"])
def test_what_names_no_model_says_what_does(model):
    with pytest.raises(ModelSourceError, match="folder"):
        load_moe(model)


def test_a_model_on_the_processor_by_number_runs(mixtral_folder):
    model = load_moe(mixtral_folder, expert_memory="50%", device="cpu:0")
    with model.moeflow, torch.no_grad():
        assert model(PROMPT).logits.shape[1] == PROMPT.shape[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", torch.device("cuda", 3)])
def test_cuda_without_a_gpu_says_so(mixtral_folder, device):
    with pytest.raises(ConfigError, match=f"device='{device}' .* no CUDA GPU .0 of them"):
        load_moe(mixtral_folder, device=device)


def test_dense_model_is_named_as_such(tmp_path):
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=50,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM has no routed experts.*from_pretrained"):
        load_moe(tmp_path)


def test_folder_that_is_not_there_and_hub_id_without_a_hub(tmp_path):
    with pytest.raises(ModelSourceError, match="nothing-here"):
        load_moe(tmp_path / "nothing-here")
    with pytest.raises(ModelSourceError, match="nobody/no-such-model"):
        load_moe("nobody/no-such-model", local_files_only=True)


def test_missing_truncated_and_corrupt_shards_are_named(folder):
    shard = sorted(folder.glob("model-*.safetensors"))[2]
    whole = shard.read_bytes()
    for damage in (
        lambda: shard.unlink(),
        lambda: shard.write_bytes(whole[:-100]),
        lambda: shard.write_bytes(b"x" * 99),
    ):
        damage()
        with pytest.raises(CheckpointError, match=shard.name.replace(".", r"\.")):
            load_moe(folder)
    shard.write_bytes(whole)
    load_moe(folder).moeflow.close()


def edit_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_index_that_names_a_file_outside_the_folder_is_refused(folder):
    edit_index(folder, lambda weight_map: weight_map.update({next(iter(weight_map)): "../../secret.safetensors"}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        load_moe(folder)


def test_index_that_names_a_tensor_that_is_not_there_is_refused(folder):
    edit_index(folder, lambda weight_map: weight_map.update({"ghost.weight": next(iter(weight_map.values()))}))
    with pytest.raises(CheckpointError, match=r"ghost\.weight"):
        load_moe(folder)


def rewrite(folder, change):
    """Write the checkpoint anew as one file after `change(tensors)`."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for shard in folder.glob("model-*.safetensors"):
        tensors.update(load_file(shard))
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def expert_tensor(tensors):
    return next(name for name in sorted(tensors) if ".experts.3." in name)


def test_checkpoint_without_one_experts_tensor_is_refused(folder):
    rewrite(folder, lambda tensors: tensors.pop(expert_tensor(tensors)))
    with pytest.raises(CheckpointError, match=r"has 8 experts.*holds 7 tensors"):
        load_moe(folder)


def test_checkpoint_with_an_expert_of_another_shape_is_refused(folder):
    rewrite(folder, lambda tensors: tensors.update({expert_tensor(tensors): torch.zeros(7, 64)}))
    with pytest.raises(CheckpointError, match="differs in shape"):
        load_moe(folder)


def test_checkpoint_without_a_dense_tensor_is_refused(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*q_proj"):
        load_moe(folder)


def test_pickled_checkpoint_is_not_opened(folder):
    rewrite(folder, lambda tensors: None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="never unpickles"):
        load_moe(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "compressed-tensors", "quark"])
def test_quantised_checkpoint_is_named_by_its_method(folder, method):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": method}
    file.write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=f"quantised with {method}"):
        load_moe(folder)


def test_unknown_architecture_and_broken_config_are_named(folder):
    file = folder / "config.json"
    file.write_text(json.dumps({"model_type": "from_the_future"}))
    with pytest.raises(UnsupportedModelError, match="from_the_future"):
        load_moe(folder)
    file.write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_moe(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_moe(folder)


def test_nothing_is_leaked_by_a_failed_load(mixtral_folder):
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(5):
        with pytest.raises(MoeflowError):
            load_moe(mixtral_folder, expert_memory=1)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert threading.active_count() <= threads


def test_disk_error_in_the_middle_names_the_expert_and_the_model_stays_usable(folder):
    """The file becomes shorter while the model is loaded, then is whole again, as a filesystem gives it back."""
    model = load_moe(folder, expert_memory=MINIMUM)
    with torch.no_grad():
        expected = model(PROMPT).logits
        files = {store_file: store_file.read_bytes() for store_file in model.moeflow.store.files}
        times = {file: (file.stat().st_atime_ns, file.stat().st_mtime_ns) for file in files}
        for file in files:
            os.truncate(file, 4096)
        for _ in range(3):
            with pytest.raises(
                ExpertReadError,
                match=r"expert \d+ of model\.layers\.\d+\.mlp\.experts could not be read: .*changed on disk",
            ):
                model(PROMPT)
            model.moeflow.check_integrity()
        for file, data in files.items():
            with open(file, "r+b") as handle:
                handle.write(data)
            os.utime(file, ns=times[file])
        assert torch.equal(model(PROMPT).logits, expected)
    model.moeflow.check_integrity()
    model.moeflow.close()


_INTERRUPTED = """
import random, signal, sys, time
import torch
torch.set_num_threads(1)
from moeflow import load_moe
model = load_moe(sys.argv[1], expert_memory=int(sys.argv[2]))
prompt = torch.arange(1, 12)[None]
random.seed(0)

def interrupt(*arguments):
    raise KeyboardInterrupt

def hung(*arguments):
    raise TimeoutError("the model hangs after an interrupt")

interrupts = 0
with torch.no_grad():
    expected = model(prompt).logits
    while interrupts < 150:
        signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0002, 0.02))
            while True:
                model(prompt)
                model(prompt[:, :1])
        except KeyboardInterrupt:
            interrupts += 1
        signal.signal(signal.SIGALRM, hung)
        signal.setitimer(signal.ITIMER_REAL, 20)
        assert torch.equal(model(prompt).logits, expected)
        model.moeflow.check_integrity()
        signal.setitimer(signal.ITIMER_REAL, 0)
model.moeflow.close()
"""


@pytest.mark.slow
def test_interrupts_at_any_moment_leave_the_model_usable(mixtral_folder):
    """Real signals at random moments: after each the model gives the same bits and no slot is lost."""
    run = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, str(mixtral_folder), str(MINIMUM)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_closed_model_says_so(mixtral_folder):
    model = load_moe(mixtral_folder, expert_memory="50%")
    model.moeflow.close()
    with pytest.raises(ClosedModelError, match="load it again"):
        model(PROMPT)


def test_saving_a_model_without_its_experts_is_refused(mixtral_folder, tmp_path):
    model = load_moe(mixtral_folder, expert_memory="50%")
    with pytest.raises(ConfigError, match="moeflow pack"):
        model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    model.moeflow.close()


def test_tied_and_untied_embeddings_load(tmp_path):
    for tied in (True, False):
        tiny_mixtral(tie_word_embeddings=tied).save_pretrained(tmp_path / str(tied))
        model = load_moe(tmp_path / str(tied), expert_memory="50%")
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        model.moeflow.close()
