"""Recording: the trace holds what the routers chose, token for token, and the model computes the same bits."""

import gc

import numpy as np
import pytest
import torch

from helpers.full_disk import with_full_disk
from helpers.small_models import tiny_mixtral
from moeflow.errors import TraceError
from moeflow.hf.fingerprint import model_fingerprint
from moeflow.hf.passes.forward import ForwardPass
from moeflow.loading.load_moe import load_moe
from moeflow.trace.format import DECODE, PREFILL, TraceFormat
from moeflow.trace.recorder import TraceRecorder
from moeflow.trace.trace import RoutingTrace

PROMPT = torch.tensor([[3, 14, 15, 92, 65, 35, 89]])


@pytest.fixture
def load(mixtral_folder):
    torch.set_num_threads(1)
    loaded = []

    def load(**options):
        loaded.append(load_moe(mixtral_folder, device="cpu", expert_memory="50%", **options))
        return loaded[-1]

    yield load
    for model in loaded:
        model.moeflow.close()


def generate(model, ids=PROMPT, num_tokens=8, **options):
    return model.generate(
        ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0, **options
    )


def routes_of(model, ids):
    """What the fully resident model's routers choose for ids [1, T]: experts and weights [T, L, K], by weight."""
    chosen, hooks = [], []
    for layer in model.model.layers:
        hooks.append(layer.mlp.experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1:])))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    experts, weights = (torch.stack(parts, 1).numpy() for parts in zip(*chosen, strict=True))
    order = np.argsort(-weights, axis=2, kind="stable")
    return np.take_along_axis(experts, order, 2), np.take_along_axis(weights, order, 2)


def test_recorded_routes_are_what_the_resident_models_routers_chose(load, mixtral, tmp_path):
    model = load(trace=tmp_path / "t")
    tokens = generate(model)
    model.moeflow.close()
    trace = RoutingTrace.open(tmp_path / "t")
    experts, weights = routes_of(mixtral, tokens[:, :-1])
    np.testing.assert_array_equal(trace.experts, experts)
    np.testing.assert_allclose(trace.weights, weights, rtol=2e-3)
    np.testing.assert_array_equal(trace.token_ids, tokens[0, :-1])
    assert trace.phase.tolist() == [PREFILL] * 7 + [DECODE] * 7
    assert trace.sequence.tolist() == [0] * 14
    assert trace.format.experts_per_layer == (8, 8, 8)
    assert (np.diff(trace.weights.astype(np.float32), axis=2) <= 0).all()


def test_recording_changes_no_bit(load, tmp_path):
    plain, recorded = load(), load(trace=tmp_path / "t")
    with torch.no_grad():
        assert torch.equal(plain(PROMPT).logits, recorded(PROMPT).logits)
    assert torch.equal(generate(plain), generate(recorded))


def test_padding_is_left_out_and_each_row_of_a_batch_is_a_sequence(load, mixtral, tmp_path):
    model = load(trace=tmp_path / "t")
    batch = torch.cat([PROMPT, torch.tensor([[0, 0, 0, 5, 6, 7, 8]])])
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    tokens = generate(model, batch, attention_mask=mask)
    model.moeflow.close()
    trace = RoutingTrace.open(tmp_path / "t")
    first, second = trace.sequences()
    assert trace.token_ids[first].tolist() == tokens[0, :-1].tolist()
    assert trace.token_ids[second].tolist() == tokens[1, 3:-1].tolist()
    np.testing.assert_array_equal(trace.experts[second], routes_of(mixtral, tokens[1:, 3:-1])[0])


def test_the_padding_an_ended_sequence_is_fed_is_left_out(tmp_path):
    recorder = TraceRecorder(tmp_path / "t", TraceFormat((4,), 1, "m"), padding=frozenset([9]))
    for tokens, continues in (([[1], [9]], False), ([[2], [9]], True)):
        recorder.begin_pass(ForwardPass(2, 1, continues, torch.tensor(tokens)))
        recorder.observe(0, torch.tensor([[0], [1]]), torch.ones(2, 1))
    recorder.close()
    assert RoutingTrace.open(tmp_path / "t").token_ids.tolist() == [1, 9, 2]


def test_a_new_prefill_starts_a_new_sequence(load, tmp_path):
    model = load(trace=tmp_path / "t")
    generate(model)
    generate(model, PROMPT[:, :3])
    model.moeflow.close()
    assert [len(range(14 + 10)[rows]) for rows in RoutingTrace.open(tmp_path / "t").sequences()] == [14, 10]


def test_sequences_are_known_by_their_cache(load, tmp_path):
    model = load(trace=tmp_path / "t")
    from transformers import DynamicCache

    caches = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for tokens in (PROMPT, PROMPT[:, :1], PROMPT[:, :1]):
            for cache in caches:
                model(tokens, past_key_values=cache, use_cache=True)
    model.moeflow.close()
    trace = RoutingTrace.open(tmp_path / "t")
    assert trace.sequence[trace.phase == DECODE].tolist() == [0, 1, 0, 1]


def test_loading_again_appends(load, tmp_path):
    for _ in range(2):
        model = load(trace=tmp_path / "t")
        generate(model)
        model.moeflow.close()
    trace = RoutingTrace.open(tmp_path / "t")
    first, second = trace.sequences()
    np.testing.assert_array_equal(trace.experts[first], trace.experts[second])


def test_another_models_trace_is_refused_and_left_alone(load, tmp_path):
    TraceRecorder(tmp_path / "t", TraceFormat((8, 8, 8), 2, "another")).close()
    before = (tmp_path / "t").read_bytes()
    with pytest.raises(TraceError, match="another"):
        load(trace=tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == before


def test_passes_that_end_early_or_skip_layers_are_dropped(tmp_path, caplog):
    recorder = TraceRecorder(tmp_path / "t", TraceFormat((4, 4), 1, "m"))

    def run(layers, num_tokens=1, continues=True):
        recorder.begin_pass(ForwardPass(1, 1, continues, torch.tensor([[7]])))
        for layer in layers:
            recorder.observe(layer, torch.full((num_tokens, 1), layer), torch.ones(num_tokens, 1))

    run([0, 1], continues=False)
    run([0])
    run([1])
    run([0, 0, 1])
    run([0, 1], num_tokens=3)
    run([0, 1])
    recorder.close()
    assert RoutingTrace.open(tmp_path / "t").experts[:, :, 0].tolist() == [[0, 1], [0, 1]]
    assert recorder.dropped_tokens == 4
    assert "4 tokens" in caplog.text


def test_an_interrupted_generation_leaves_whole_tokens(load, tmp_path):
    model = load(trace=tmp_path / "t")
    calls = []

    def interrupt(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model)
    hook.remove()
    generate(model)
    model.moeflow.close()
    trace = RoutingTrace.open(tmp_path / "t")
    assert [len(range(100)[rows]) for rows in trace.sequences()] == [8, 14]


def test_ids_that_stand_for_none_come_last_with_no_weight(tmp_path):
    recorder = TraceRecorder(tmp_path / "t", TraceFormat((4, 2), 3, "m"))
    recorder.begin_pass(ForwardPass(1, 1, False, torch.tensor([[7]])))
    recorder.observe(0, torch.tensor([[4, 1, 3]]), torch.tensor([[0.9, 0.2, 0.3]]))
    recorder.observe(1, torch.tensor([[1]]), torch.tensor([[1.0]]))
    recorder.close()
    trace = RoutingTrace.open(tmp_path / "t")
    assert trace.experts[0].tolist() == [[3, 1, 255], [1, 255, 255]]
    np.testing.assert_allclose(trace.weights[0], [[0.3, 0.2, 0], [1, 0, 0]], rtol=1e-3)


def test_long_recordings_are_on_disk_before_they_are_closed(tmp_path):
    recorder = TraceRecorder(tmp_path / "t", TraceFormat((4,), 1, "m"))
    for step in range(700):
        recorder.begin_pass(ForwardPass(1, 1, step > 0, torch.tensor([[step]])))
        recorder.observe(0, torch.tensor([[step % 4]]), torch.ones(1, 1))
    assert 400 < len(RoutingTrace.open(tmp_path / "t")) < 700
    recorder.close()
    assert RoutingTrace.open(tmp_path / "t").token_ids.tolist() == list(range(700))


@pytest.mark.slow
def test_a_model_that_is_dropped_unclosed_leaves_its_trace(load, mixtral_folder, tmp_path):
    model = load_moe(mixtral_folder, device="cpu", expert_memory="50%", trace=tmp_path / "t")
    generate(model)
    del model
    gc.collect()
    assert len(RoutingTrace.open(tmp_path / "t")) == 14


@pytest.mark.slow
def test_the_compiled_model_records_the_same_routes(load, tmp_path):
    model = load(trace=tmp_path / "t")
    with torch.no_grad():
        model(PROMPT)
        torch.compile(model, backend="aot_eager")(PROMPT)
    model.moeflow.close()
    trace = RoutingTrace.open(tmp_path / "t")
    first, second = trace.sequences()
    np.testing.assert_array_equal(trace.experts[first], trace.experts[second])


def test_fingerprint_is_of_the_routers_not_of_the_dtype_or_the_experts_place(mixtral, tmp_path):
    from transformers import AutoModelForCausalLM

    mixtral = tiny_mixtral().bfloat16()
    mixtral.save_pretrained(tmp_path / "m")
    prints = {model_fingerprint(mixtral)}
    for dtype in (torch.float32, torch.bfloat16):
        prints.add(model_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)))
        prints.add(model_fingerprint(load_moe(tmp_path / "m", device="cpu", dtype=dtype)))
    assert len(prints) == 1
    with torch.no_grad():
        next(p for n, p in mixtral.named_parameters() if p.shape == (8, 64))[0, 0] += 1
    assert model_fingerprint(mixtral) not in prints
    assert model_fingerprint(tiny_mixtral(num_experts_per_tok=3).bfloat16()) not in prints


def test_closing_a_model_on_a_full_disk_names_the_trace(mixtral_folder, tmp_path):
    def run():
        torch.set_num_threads(1)
        model = load_moe(mixtral_folder, device="cpu", expert_memory="50%", trace=tmp_path / "t")
        generate(model)
        with pytest.raises(TraceError, match=r"t cannot be written: File too large\. Make room"):
            model.moeflow.close()
        model.moeflow.close()

    assert with_full_disk(4096 + 10, run) == 0
    with pytest.raises(TraceError, match="empty"):
        RoutingTrace.open(tmp_path / "t")
