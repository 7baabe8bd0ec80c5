"""Prediction beside a running model: the same bits with any predictor, refusals by name, failures that stay local."""

import logging

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moeflow import load_moe
from moeflow.cli.main import main
from moeflow.errors import ConfigError, PredictorError
from moeflow.hf.fingerprint import model_fingerprint
from moeflow.loading.live_predictor import NAMES
from moeflow.predictors.files import save_predictor
from moeflow.predictors.markov import Markov
from moeflow.trace.trace import RoutingTrace

PROMPT = torch.arange(1, 30).unsqueeze(0)


def generate(model, prompt=PROMPT, **options):
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(prompt, output_scores=True, return_dict_in_generate=True, **options)


def same(one, other):
    return torch.equal(one.sequences, other.sequences) and all(map(torch.equal, one.scores, other.scores))


@pytest.fixture(scope="module")
def expected(mixtral_folder):
    model = load_moe(mixtral_folder, expert_memory="100%", predictor=None)
    yield generate(model)
    model.moeflow.close()


@pytest.fixture(scope="module")
def trained(mixtral_folder, tmp_path_factory):
    """A sequence predictor of the model, trained by the commands a person would use."""
    folder = tmp_path_factory.mktemp("trained")
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{n} {n + 1} {n + 2} {n + 3}\n" for n in range(12)))
    model = load_moe(mixtral_folder, expert_memory="100%", predictor=None, trace=folder / "t.trace")
    for n in range(12):
        generate(model, torch.arange(n, n + 6).unsqueeze(0))
    model.moeflow.close()
    command = [
        "predictor",
        "train",
        str(folder / "t.trace"),
        "--kind",
        "sequence",
        "-o",
        str(folder / "p"),
        "--epochs",
        "1",
    ]
    assert main(command) == 0
    return folder / "p"


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["15%", "50%", "100%"])
@pytest.mark.parametrize("name", ["auto", *NAMES])
def test_any_predictor_at_any_budget_gives_the_same_bits(mixtral_folder, expected, name, budget):
    model = load_moe(mixtral_folder, expert_memory=budget, predictor=name)
    for _ in range(2):
        assert same(generate(model), expected)
        model.moeflow.check_integrity()
    stats = model.moeflow.stats()
    assert stats["prediction"]["failure"] is None
    if budget == "100%":  # what has room for good is not predicted
        assert (stats["prediction"]["steps_on"], stats["prediction"]["reason"]) == (0, "every expert has room")
    else:
        assert stats["prediction"]["steps_on"] > 0
    assert stats["decode"]["predict_s"] > 0
    model.moeflow.close()


@pytest.mark.slow
def test_a_trained_predictor_prefetches_and_changes_no_bit(mixtral_folder, expected, trained):
    model = load_moe(mixtral_folder, expert_memory="50%", predictor=trained)
    assert same(generate(model), expected)
    model.moeflow.check_integrity()
    assert model.moeflow.stats()["prediction"]["predictor"] == "sequence"
    assert model.moeflow.stats()["prediction"]["prefetch"]["issued"] > 0
    model.moeflow.close()


def test_the_folded_routers_choose_as_the_models_own(mixtral_folder):
    """The tap found the right norm: the early answers are those of the routers themselves."""
    model = load_moe(mixtral_folder, expert_memory="50%", predictor="lookahead")
    generate(model, max_new_tokens=40)
    lookahead = model.moeflow.predictor
    assert not lookahead.unchecked.any()
    assert lookahead.usable.all()
    model.moeflow.close()


@pytest.mark.slow
def test_batches_beams_and_assisted_decoding_go_on_with_a_predictor(mixtral_folder):
    whole = load_moe(mixtral_folder, expert_memory="100%", predictor=None)
    model = load_moe(mixtral_folder, expert_memory="30%", predictor="ensemble")
    batch = torch.stack([torch.arange(1, 9), torch.arange(40, 48)])
    for options in ({}, {"num_beams": 3}):
        assert same(generate(model, batch, **options), generate(whole, batch, **options))
    assert same(generate(model, prompt_lookup_num_tokens=3), generate(whole, prompt_lookup_num_tokens=3))
    model.moeflow.check_integrity()
    whole.moeflow.close()
    model.moeflow.close()


class Broken(Markov):
    """Fails in the way it is told to, some steps into the generation."""

    def __init__(self, *sizes, failure):
        super().__init__(*sizes)
        self.failure, self.steps = failure, 0

    def step(self, token_ids):
        self.steps += 1
        if self.steps == 6:
            if self.failure == "raises":
                raise RuntimeError("out of luck")
            return np.full((len(token_ids), self.num_layers, self.num_experts), self.failure, np.float32)
        return super().step(token_ids)


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["raises", np.nan, 7.0, np.inf, -0.5])
def test_a_failing_predictor_is_switched_off_with_one_warning(mixtral_folder, expected, failure, caplog, monkeypatch):
    broken = Broken(3, 8, failure=failure)
    monkeypatch.setattr("moeflow.loading.load_moe.build_predictor", lambda *args: broken)
    model = load_moe(mixtral_folder, expert_memory="30%", predictor="markov")
    with caplog.at_level(logging.WARNING, logger="moeflow"):
        assert same(generate(model), expected)
        assert same(generate(model), expected)
    assert len([record for record in caplog.records if "switched off" in record.message]) == 1
    prediction = model.moeflow.stats()["prediction"]
    assert not prediction["on"]
    assert prediction["failure"]
    assert broken.steps == 6
    model.moeflow.check_integrity()
    model.moeflow.close()


class Liar(Markov):
    """Foretells, for certain, the experts that it has seen least."""

    def step(self, token_ids):
        answer = super().step(token_ids)
        return np.zeros((1, self.num_layers, self.num_experts), np.float32) if answer is None else 1 - answer


def test_a_liar_changes_no_bit(mixtral_folder, expected, monkeypatch):
    monkeypatch.setattr("moeflow.loading.load_moe.build_predictor", lambda *args: Liar(3, 8))
    model = load_moe(mixtral_folder, expert_memory="30%", predictor="markov")
    for _ in range(3):
        assert same(generate(model), expected)
        model.moeflow.check_integrity()
    model.moeflow.close()


def test_unknown_names_and_absent_files_are_refused(mixtral_folder):
    with pytest.raises(ConfigError, match=r"no-such.*lookahead, markov"):
        load_moe(mixtral_folder, predictor="no-such")


def test_a_predictor_of_another_model_is_refused(mixtral_folder, tmp_path):
    save_predictor(Markov(3, 8), tmp_path / "other", fingerprint="0123456789abcdef", top_k=2)
    with pytest.raises(PredictorError, match="0123456789abcdef"):
        load_moe(mixtral_folder, predictor=tmp_path / "other")
    eager = AutoModelForCausalLM.from_pretrained(mixtral_folder)
    save_predictor(Markov(3, 9), tmp_path / "more", fingerprint=model_fingerprint(eager), top_k=2)
    with pytest.raises(PredictorError, match="9"):
        load_moe(mixtral_folder, predictor=tmp_path / "more")


def test_a_corrupt_predictor_file_is_refused(mixtral_folder, trained, tmp_path):
    (tmp_path / "cut").write_bytes(trained.read_bytes()[:5000])
    with pytest.raises(PredictorError, match="cut"):
        load_moe(mixtral_folder, predictor=tmp_path / "cut")


def test_prediction_and_recording_go_together(mixtral_folder, tmp_path):
    model = load_moe(mixtral_folder, expert_memory="50%", trace=tmp_path / "t")
    generate(model)
    model.moeflow.close()
    assert len(RoutingTrace.open(tmp_path / "t")) == PROMPT.shape[1] + 23
