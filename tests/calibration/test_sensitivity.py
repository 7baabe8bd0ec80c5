"""Calibration: what is measured agrees with doing it by hand, and the formats chosen keep to the budget."""

import random

import numpy as np
import pytest
import torch

from helpers.damage import damaged
from moeflow.calibration.expert_statistics import ExpertStatistics
from moeflow.calibration.sensitivity import measure_experts
from moeflow.calibration.windows import cut_windows
from moeflow.convert.mixed_precision import allocate_formats, choose_formats
from moeflow.errors import ConfigError
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import find_format
from moeflow.kernels.quantization.quantize import quantize

FORMATS = ["int2-g32", "int3-g32", "int8-g32"]


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 128, (3, 32), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def statistics(mixtral, windows):
    return measure_experts(mixtral, windows, FORMATS, method="rtn")


def rounded(module, expert, form):
    spec = find_format(form)
    for name in ("gate_up_proj", "down_proj"):
        value = getattr(module, name)[expert]
        stored = quantize(value, spec, method="rtn", name=name)
        yield name, dequantize(stored, name, spec, tuple(value.shape))


@torch.no_grad()
def mixtral_with(mixtral, changes):
    """A copy of the model with (layer, expert) in a format each."""
    import copy

    model = copy.deepcopy(mixtral)
    for (layer, expert), form in changes.items():
        module = model.model.layers[layer].mlp.experts
        for name, value in list(rounded(module, expert, form)):
            getattr(module, name)[expert] = value
    return model


@torch.no_grad()
def test_error_is_that_of_the_model_with_the_expert_in_that_format(mixtral, windows, statistics):
    for layer, expert, j in ((0, 3, 0), (2, 5, 1)):
        outputs = []
        for changes in ({}, {(layer, expert): FORMATS[j]}):
            model = mixtral_with(mixtral, changes)
            parts = {}
            block = model.model.layers[layer]
            block.mlp.register_forward_hook(lambda m, a, output, parts=parts: parts.update(moe=output))
            block.register_forward_hook(lambda m, a, output, parts=parts: parts.update(stream=output))
            model(input_ids=torch.tensor(windows))
            outputs.append(parts)
        exact, changed = outputs
        error = (changed["moe"] - exact["moe"]).reshape(-1, 64).square().sum(-1)
        relative = error / exact["stream"].reshape(-1, 64).square().sum(-1)
        expected = relative.sum().item() / statistics.routed[layer, expert]
        assert statistics.error[layer, expert, j] == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("probe", [0, 2])
def test_layer_is_probed_by_the_divergence_of_the_model_with_that_layer_quantised(mixtral, windows, statistics, probe):
    layer, window = 1, torch.tensor(windows[probe : probe + 1])
    changed = mixtral_with(mixtral, {(layer, expert): "int3-g32" for expert in range(8)})
    exact, other = (model(input_ids=window).logits[0].log_softmax(-1) for model in (mixtral, changed))
    divergence = (exact.exp() * (exact - other)).sum(-1).mean().item()
    streams = []
    for model in (mixtral, changed):
        handle = model.model.layers[layer].register_forward_hook(lambda m, a, output: streams.append(output[0]))
        model(input_ids=window)
        handle.remove()
    relative = (streams[1] - streams[0]).square().sum(-1) / streams[0].square().sum(-1)
    assert statistics.divergence[layer, probe] == pytest.approx(divergence, rel=1e-2)
    assert statistics.disturbance[layer, probe] == pytest.approx(relative.mean().item(), rel=1e-2)


def with_sensitivities(statistics, per_window):
    return statistics._replace(divergence=np.array(per_window), disturbance=np.ones(np.shape(per_window)))


def test_sensitivity_that_windows_agree_on_is_kept(statistics):
    hard_window = [[1.0, 8.0], [2.0, 16.0], [4.0, 32.0]]
    found = with_sensitivities(statistics, hard_window).sensitivity
    np.testing.assert_allclose(found[1:] / found[:-1], 2.0)


def test_sensitivity_that_windows_disagree_on_is_that_of_all_layers(statistics):
    found = with_sensitivities(statistics, [[1.0, 9.0], [9.0, 1.1], [1.0, 9.0]]).sensitivity
    np.testing.assert_allclose(found, found[0])


def test_every_route_of_the_text_is_counted_once(statistics, windows):
    assert statistics.num_tokens == 96
    assert (statistics.routed.sum(1) == 2 * 96).all()
    assert statistics.mean_weight.max() <= 1


def test_more_bits_cost_less(statistics):
    assert (np.diff(statistics.costs(), axis=-1) < 0).all()


def test_expert_that_no_token_reached_is_not_free(statistics):
    routed, error = statistics.routed.copy(), statistics.error.copy()
    routed[1, 2], error[1, 2] = 0, 0
    assert (statistics._replace(routed=routed, error=error).costs()[1, 2] > 0).all()


def test_measuring_twice_gives_the_same_bits(mixtral, windows, statistics):
    again = measure_experts(mixtral, windows, FORMATS, method="rtn")
    assert np.array_equal(again.costs(), statistics.costs())


def test_model_is_left_without_hooks_and_progress_counts_every_expert(mixtral, windows):
    calls = []
    measure_experts(mixtral, windows[:1], FORMATS[:1], method="rtn", progress=lambda *done: calls.append(done))
    assert calls == [(i + 1, 24) for i in range(24)]
    assert not any(module._forward_hooks for module in mixtral.modules())


def test_offloaded_model_is_measured_like_one_in_memory(mixtral_folder, windows, statistics):
    from moeflow import load_moe

    model = load_moe(mixtral_folder, device="cpu", expert_memory="25%", predictor=None)
    try:
        found = measure_experts(model, windows, FORMATS, method="rtn")
    finally:
        model.moeflow.close()
    assert np.array_equal(found.routed, statistics.routed)
    np.testing.assert_allclose(found.costs(), statistics.costs(), rtol=0.02)


def test_file_gives_back_what_was_saved_and_other_files_are_refused(statistics, tmp_path):
    file = tmp_path / "statistics.npz"
    statistics.save(file)
    found = ExpertStatistics.load(file)
    assert all(np.array_equal(a, b) for a, b in zip(found, statistics, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.npz"]
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ConfigError, match="holds no calibration statistics"):
        ExpertStatistics.load(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        ExpertStatistics.load(tmp_path / "none.npz")


@pytest.mark.parametrize("average_bits", [2.0, 2.5, 3.0, 5.0])
def test_formats_take_no_more_than_uniform_widths_on_the_line_between(statistics, average_bits):
    found = allocate_formats(statistics, average_bits)
    sizes = dict(zip(FORMATS, statistics.num_bytes[0].tolist(), strict=True))
    taken = sum(sizes[name] for row in found.formats for name in row)
    assert taken <= 24 * np.interp(average_bits, [2, 3, 8], [sizes[name] for name in FORMATS])
    assert found.allocation.bound <= found.allocation.cost


def test_whole_average_costs_no_more_than_the_uniform_width(statistics):
    uniform = statistics.costs()[..., 1].sum()
    assert allocate_formats(statistics, 3.0).allocation.cost <= uniform


def test_expert_that_is_fetched_for_every_token_gets_the_fewest_bits(statistics):
    rates = np.zeros((3, 8))
    rates[1, 4] = 1.0
    assert allocate_formats(statistics, 6.0).allocation.choice[1, 4] > 0
    assert allocate_formats(statistics, 6.0, miss_rates=rates, transfer_weight=1e6).allocation.choice[1, 4] == 0
    with pytest.raises(ConfigError, match=r"needs miss_rates of shape \[3, 8\]"):
        allocate_formats(statistics, 3.0, transfer_weight=1.0)


def test_average_outside_the_widths_is_refused(statistics):
    with pytest.raises(ConfigError, match="outside the widths 2, 3, 8"):
        allocate_formats(statistics, 1.5)


class Letters:
    """A tokenizer: one token a letter."""

    chat_template = None

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(letter) % 128 for letter in text]}


def test_formats_are_chosen_from_a_text_alone(mixtral):
    text = "the quick brown fox jumps over the lazy dog. " * 200
    found = choose_formats(
        mixtral, text, 2.5, widths=(2, 3, 4), group_size=32, method="rtn", num_tokens=512, tokenizer=Letters()
    )
    assert [len(row) for row in found.formats] == [8, 8, 8]
    assert {name for row in found.formats for name in row} <= {"int2-g32", "int3-g32", "int4-g32"}


def test_windows_spread_over_the_whole_text():
    text = "a" * 5000 + "b" * 5000
    windows = cut_windows(Letters(), text, 1024)
    assert {len(window) for window in windows} == {256}
    assert {window[0] for window in windows} == {ord("a") % 128, ord("b") % 128}


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(ConfigError, match="fewer than 256 tokens"):
        cut_windows(Letters(), "too short", 1024)


def test_windows_of_different_lengths_are_refused(mixtral):
    with pytest.raises(ConfigError, match=r"\[2, 3\] tokens long"):
        measure_experts(mixtral, [[1, 2], [1, 2, 3]], FORMATS)


def test_widths_that_are_no_formats_are_refused(mixtral):
    with pytest.raises(ConfigError, match="not formats to choose between"):
        choose_formats(mixtral, "x", 2.5, widths=(2, 5), tokenizer=Letters())


@pytest.mark.parametrize(("average_bits", "smallest"), [(1.5, "int1-g32"), (2.5, "int2-g32")])
def test_one_bit_is_left_to_averages_that_need_it(mixtral, average_bits, smallest):
    text = "the quick brown fox jumps over the lazy dog. " * 50
    found = choose_formats(
        mixtral, text, average_bits, group_size=32, method="rtn", num_tokens=256, tokenizer=Letters()
    )
    assert found.statistics.formats[0] == smallest


def test_a_damaged_file_is_refused_or_read_as_it_was(statistics, tmp_path):
    file = tmp_path / "statistics.npz"
    statistics.save(file)
    whole, rng, num_refused = file.read_bytes(), random.Random(0), 0
    for _ in range(300):
        file.write_bytes(damaged(whole, rng, 300))
        try:
            found = ExpertStatistics.load(file)
        except ConfigError:
            num_refused += 1
        else:
            assert all(np.array_equal(a, b) for a, b in zip(found, statistics, strict=True))
    assert num_refused > 200
