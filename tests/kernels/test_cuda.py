"""The same claims on a GPU: pinned host tier, copy stream, one budget, the same bits. Skipped where there is none."""

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.lossless_models import lossless_mixtral
from helpers.small_gguf import write_small
from moeflow import Engine, load_moe
from moeflow.convert.pack import pack_model
from moeflow.errors import BudgetError
from moeflow.offload.streams import CudaStreams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and `-m gpu`"),
]

PROMPT = torch.arange(1, 40).unsqueeze(0)


def logits(model):
    with torch.no_grad():
        return model(PROMPT.to(model.device)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_same_bits_at_every_budget(mixtral_folder, dtype):
    whole = load_moe(mixtral_folder, device="cuda", expert_memory="100%", dtype=dtype)
    expected = logits(whole)
    for budget in ("15%", "25%", "50%"):
        for host in ("50%", "100%"):
            model = load_moe(mixtral_folder, device="cuda", expert_memory=budget, host_memory=host, dtype=dtype)
            for _ in range(3):
                assert torch.equal(logits(model), expected)
                model.moeflow.check_integrity()
            model.moeflow.close()
    whole.moeflow.close()


def test_tokens_equal_transformers_eager(mixtral_folder):
    eager = AutoModelForCausalLM.from_pretrained(mixtral_folder, experts_implementation="eager").eval().cuda()
    model = load_moe(mixtral_folder, device="cuda", expert_memory="25%")
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(PROMPT.cuda(), **options), eager.generate(PROMPT.cuda(), **options))
    stats = model.moeflow.stats()
    assert stats["decode"]["bytes_from_host"] > 0
    assert stats["memory"]["device_peak_bytes"] <= stats["memory"]["expert_budget_bytes"]
    model.moeflow.close()


def test_close_gives_device_and_pinned_memory_back(mixtral_folder):
    load_moe(mixtral_folder, device="cuda", expert_memory="50%").moeflow.close()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load_moe(mixtral_folder, device="cuda", expert_memory="100%")
    logits(model)
    model.moeflow.close()
    del model
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


def test_activations_are_measured_alike_at_every_load(mixtral_folder):
    plans = []
    for _ in range(2):
        model = load_moe(mixtral_folder, device="cuda")
        with model.moeflow, Engine(model) as engine:
            plans.append(model.moeflow.stats()["plan"])
            assert engine.stats()["kv_budget_bytes"] <= plans[-1]["key_value_bytes"]
        del model
        gc.collect()
    assert plans[0]["activations"] == "measured"
    assert plans[0]["activation_bytes"] == plans[1]["activation_bytes"] > 0
    assert plans[0]["expert_bytes"] == plans[1]["expert_bytes"]


def test_host_budget_below_the_reads_in_flight_is_refused(mixtral_folder):
    with pytest.raises(BudgetError, match="pinned slot"):
        load_moe(mixtral_folder, device="cuda", host_memory=1000)


def decoded(model, num_tokens=12):
    """Feed fixed tokens one by one; return the logits of each."""
    with torch.no_grad():
        output, found = model(PROMPT.to(model.device), use_cache=True), []
        for token in range(1, num_tokens):
            ids = torch.tensor([[token]], device=model.device)
            output = model(ids, past_key_values=output.past_key_values, use_cache=True)
            found.append(output.logits[0, -1])
    return torch.stack(found)


def test_experts_computed_on_the_host_give_nearly_the_same_logits(mixtral_folder):
    whole = load_moe(mixtral_folder, device="cuda", expert_memory="100%", predictor=None)
    expected = decoded(whole)
    whole.moeflow.close()
    model = load_moe(mixtral_folder, device="cuda", expert_memory="15%", host_memory="100%", miss="cheapest")
    for _ in range(5):
        torch.testing.assert_close(decoded(model), expected, rtol=1e-3, atol=1e-3)
        model.moeflow.check_integrity()
    stats = model.moeflow.stats()
    assert stats["decode"]["decisions"]["computed_on_host"] > 0
    assert stats["decode"]["decisions"]["copied"] > 0
    assert stats["miss"]["copy_bytes_per_s"] > 0
    assert stats["miss"]["host_bytes_per_s"] > 0
    model.moeflow.close()


def test_a_copy_is_timed_on_the_device():
    streams = CudaStreams(torch.device("cuda", torch.cuda.current_device()))
    source = torch.zeros(64 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    first, second = streams.copy(target, source, None), streams.copy(target, source, streams.compute_event())
    streams.wait(second)
    streams.synchronize(second)
    assert streams.done(first)
    assert 64 << 20 < (64 << 20) / streams.copy_s(second) < 2e12  # bytes a second


@pytest.mark.parametrize("has_triton", [True, False])
def test_lossless_experts_give_the_bits_of_bfloat16(tmp_path, monkeypatch, has_triton):
    """From codes by Triton's kernels, and unpacked by torch without them; one expert stays bfloat16."""
    if not has_triton:
        monkeypatch.setattr("moeflow.moe.choose_compute.TritonCompute.can_run", lambda self, records: False)
    lossless_mixtral().save_pretrained(tmp_path / "source")
    pack_model(tmp_path / "source", tmp_path / "packed", lossless=True)
    with (whole := load_moe(tmp_path / "source", device="cuda", expert_memory="100%", predictor=None)).moeflow:
        expected = logits(whole)
    for budget in ("25%", "100%"):
        with (model := load_moe(tmp_path / "packed", device="cuda", expert_memory=budget, predictor=None)).moeflow:
            assert torch.equal(logits(model), expected)


def test_experts_in_the_blocks_of_a_gguf_file_are_those_of_their_values(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "cache"))
    file, model = write_small(tmp_path)
    expected, found = logits(model), []
    for budget in ("25%", "100%"):
        with (loaded := load_moe(file, device="cuda", expert_memory=budget, dtype=torch.float32)).moeflow:
            found.append(logits(loaded).cpu())
            computes = loaded.model.layers[0].mlp.experts._moeflow._computes.values()
            assert {type(compute).__name__ for compute in computes} == {"TritonCompute"}
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=float(1e-5 * expected.abs().max()))
