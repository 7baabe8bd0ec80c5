"""load_moe as its users call it: everything a transformers model does, inside the budget, with the same bits."""

import gc
import os
import threading
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from helpers.small_models import tiny_mixtral
from moeflow import load_moe
from moeflow.hf import pretrained

PROMPT = torch.arange(1, 12).unsqueeze(0)


@pytest.fixture
def load(mixtral_folder):
    """load_moe on the shared checkpoint; closes what it loaded."""
    loaded = []

    def load(folder=mixtral_folder, **options):
        loaded.append(load_moe(folder, **options))
        return loaded[-1]

    yield load
    for model in loaded:
        model.moeflow.close()


@pytest.fixture(scope="module")
def eager(mixtral_folder):
    model = AutoModelForCausalLM.from_pretrained(mixtral_folder, experts_implementation="eager").eval()
    pretrained.own_dense_weights(model)
    return model


def minimum(model):
    return 3 * model.moeflow.store.layers[0].layout.record.num_bytes // 4096 * 4096 + 3 * 4096


def logits(model, ids=PROMPT, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_same_bits_at_every_budget_and_policy(load, dtype):
    whole = load(expert_memory="100%", dtype=dtype)
    expected = logits(whole)
    for policy in ("lru", "lfu", "lfru", "static"):
        for budget in (minimum(whole), "25%", "50%", "auto"):
            small = load(expert_memory=budget, policy=policy, dtype=dtype)
            for _ in range(2):
                assert torch.equal(logits(small), expected)
            small.moeflow.check_integrity()


def test_reads_that_come_late_or_early_do_not_change_a_bit(load, monkeypatch):
    """Hold every read back until a later one has ended, so that experts arrive in reverse."""
    expected = logits(load(expert_memory="100%"))
    model = load(expert_memory="50%")
    store, gate, order = model.moeflow.store, threading.Semaphore(0), []
    read = store.read

    def late(key, record, **how):
        if key.expert % 2:
            gate.acquire(timeout=0.2)
        found = read(key, record, **how)
        order.append(key)
        gate.release()
        return found

    monkeypatch.setattr(store, "read", late)
    assert torch.equal(logits(model), expected)
    assert order != sorted(order)


def test_logits_equal_transformers_eager(load, eager):
    found, expected = logits(load(expert_memory="25%")), logits(eager)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
    ],
    ids=["greedy", "sampling", "beams", "prompt lookup"],
)
def test_generate_gives_the_tokens_of_eager(load, eager, options):
    model = load(expert_memory="50%")
    outputs = []
    for each in (model, eager):
        torch.manual_seed(3)
        outputs.append(each.generate(PROMPT, max_new_tokens=12, pad_token_id=0, **options))
    assert torch.equal(*outputs)


def test_assisted_generation_gives_the_tokens_of_greedy(load, eager, tmp_path):
    tiny_mixtral(num_hidden_layers=1).save_pretrained(tmp_path / "draft")
    draft = load(tmp_path / "draft", expert_memory="50%")
    model = load(expert_memory="50%")
    found = model.generate(PROMPT, max_new_tokens=12, do_sample=False, assistant_model=draft, pad_token_id=0)
    assert torch.equal(found, eager.generate(PROMPT, max_new_tokens=12, do_sample=False, pad_token_id=0))


def test_padded_batch_gives_each_sequence_its_own_tokens(load, eager):
    ids = torch.tensor([[0, 0, 0, 5, 6, 7], [9, 8, 7, 6, 5, 4]])
    mask = (ids != 0).long()
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(load(expert_memory="50%").generate(ids, **options), eager.generate(ids, **options))


def test_pipeline_and_router_logits_work(load, eager, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(number): number for number in range(128)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")
    model = load(expert_memory="50%")
    results = [
        pipeline("text-generation", model=each, tokenizer=tokenizer)("5 6 7", max_new_tokens=6, do_sample=False)
        for each in (model, eager)
    ]
    assert results[0] == results[1]
    found, expected = model(PROMPT, output_router_logits=True), eager(PROMPT, output_router_logits=True)
    assert len(found.router_logits) == 3
    assert torch.allclose(found.router_logits[0], expected.router_logits[0], atol=1e-5)
    assert torch.allclose(found.aux_loss, expected.aux_loss, atol=1e-5)


def test_verification_passes_of_prompt_lookup_count_as_decode(load):
    model = load(expert_memory="50%")
    model.generate(PROMPT.repeat(1, 2), max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=3, pad_token_id=0)
    stats = model.moeflow.stats()
    assert stats["prefill"]["forwards"] == 1
    assert stats["decode"]["tokens"] >= stats["decode"]["forwards"]


def test_config_options_are_obeyed_as_from_pretrained_does(load):
    model = load(expert_memory="50%", output_router_logits=True, num_experts_per_tok=1)
    assert model.config.output_router_logits
    assert len(model(PROMPT).router_logits) == 3
    assert model.moeflow.stats()["prefill"]["misses"] > 0


def test_no_tokens_give_no_output(load):
    model = load(expert_memory="50%")
    experts = model.model.layers[0].mlp.experts
    nothing = experts(torch.zeros(0, 64), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert nothing.shape == (0, 64)


@pytest.mark.slow
def test_compiled_model_keeps_the_experts_as_one_op(load):
    model = load(expert_memory="50%")
    expected = logits(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=False)
    with torch.no_grad():
        found = compiled(PROMPT, use_cache=False).logits
    assert torch.equal(found, expected)
    ops = [node for graph in graphs for node in graph.graph.nodes if "moeflow.experts" in str(node.target)]
    assert len(ops) == 3


def test_backward_says_why_it_cannot(load):
    loss = load(expert_memory="50%")(PROMPT, labels=PROMPT).loss
    with pytest.raises(RuntimeError, match="no backward pass"):
        loss.backward()


def test_budget_is_obeyed_and_each_expert_is_read_once_a_layer(load):
    model = load(expert_memory="25%", predictor=None)
    logits(model, torch.arange(1, 100).unsqueeze(0))
    stats = model.moeflow.stats()
    memory, prefill = stats["memory"], stats["prefill"]
    assert memory["device_peak_bytes"] <= memory["expert_budget_bytes"] <= 0.25 * memory["all_experts_bytes"]
    assert stats["slots"] == 6
    assert prefill["misses"] == 24  # all 8 experts of 3 layers, although only 6 fit
    record = model.moeflow.store.layers[0].layout.record.num_bytes
    assert 24 * record <= prefill["bytes_from_disk"] < 24 * (record + 3 * 4096)


@pytest.mark.parametrize("step", ["python", "auto"])
def test_stats_keep_prefill_and_decode_apart(load, step):
    model = load(expert_memory="100%", step=step)
    model.generate(PROMPT, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    stats = model.moeflow.stats()
    assert (stats["prefill"]["forwards"], stats["prefill"]["tokens"]) == (1, PROMPT.shape[1])
    assert (stats["decode"]["forwards"], stats["decode"]["tokens"]) == (4, 4)
    assert stats["decode"]["hits"] + stats["decode"]["misses"] == 4 * 3 * 2
    of_phases = stats["prefill"]["bytes_from_disk"] + stats["decode"]["bytes_from_disk"]
    if step == "python":
        assert stats["io"]["bytes"] == of_phases
    else:  # the check of a captured step reads too, in no phase
        assert stats["io"]["bytes"] >= of_phases
    model.moeflow.reset_stats()
    assert model.moeflow.stats()["decode"] == model.moeflow.stats()["prefill"]
    assert model.moeflow.stats()["decode"]["hit_rate"] is None


def test_two_models_live_side_by_side(load, mixtral_folder, tmp_path):
    tiny_mixtral(num_local_experts=4, hidden_size=32).save_pretrained(tmp_path / "other")
    one, two = load(expert_memory="50%"), load(tmp_path / "other", expert_memory="50%")
    alone = logits(one), logits(two)
    for _ in range(3):
        assert torch.equal(logits(one), alone[0])
        assert torch.equal(logits(two), alone[1])
    one.moeflow.close()
    assert torch.equal(logits(two), alone[1])


def test_two_threads_may_use_one_model(load):
    model = load(expert_memory="25%")
    prompts = [torch.arange(n, n + 9).unsqueeze(0) for n in (1, 40)]
    expected = [logits(model, prompt) for prompt in prompts]
    found = [[], []]

    def work(number):
        for _ in range(5):
            found[number].append(logits(model, prompts[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        assert all(torch.equal(each, expected[number]) for each in found[number])
    model.moeflow.check_integrity()


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("moeflow-read")]


def open_shards(folder):
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [link for link in links if os.path.exists(link) and os.readlink(link).startswith(str(folder))]


@pytest.mark.slow
def test_close_and_garbage_collection_leave_no_thread_file_or_slot(mixtral_folder):
    gc.collect()
    before, files_before = len(readers()), len(open_shards(mixtral_folder))
    for close in (True, False):
        model = load_moe(mixtral_folder, expert_memory="50%")
        logits(model)
        assert len(readers()) > before
        assert len(open_shards(mixtral_folder)) > files_before
        arena = weakref.ref(model.moeflow._residency.pool.bytes)
        if close:
            with model.moeflow:
                pass
        else:
            del model
        gc.collect()
        assert len(readers()) == before
        assert len(open_shards(mixtral_folder)) == files_before
        assert arena() is None


def test_closing_twice_is_allowed(load):
    model = load(expert_memory="50%")
    model.moeflow.close()
    model.moeflow.close()
    assert model.moeflow.closed


def test_experts_are_never_materialised(load):
    model = load(expert_memory="50%")
    dense = sum(parameter.numel() for parameter in model.parameters())
    whole = sum(parameter.numel() for parameter in tiny_mixtral().parameters())
    experts = 3 * 8 * 3 * 64 * 96
    assert dense == whole - experts
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_step_touches_the_cache_once_an_expert(load):
    model = load(expert_memory="100%", policy="lfu")
    logits(model)
    frequency = model.moeflow.cache.frequency
    assert len(frequency) == 24
    assert set(frequency.tolist()) == {1}
