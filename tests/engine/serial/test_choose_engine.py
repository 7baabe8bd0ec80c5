"""Every model that generates token by token gets an engine, and the same requests wait at most."""

import pytest

from helpers.engine_requests import tokens
from helpers.families import FAMILIES
from helpers.family_models import build_model
from moeflow import load_moe
from moeflow.engine.engine import Engine
from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.serial.choose_engine import engine_for
from moeflow.engine.serial.serial_engine import SerialEngine
from moeflow.errors import ConfigError, QueueFullError


@pytest.fixture(scope="module")
def jamba(tmp_path_factory):
    """A model that runs one sequence at a time, with its experts fetched."""
    folder = tmp_path_factory.mktemp("serial") / "jamba"
    build_model(FAMILIES["jamba"]).save_pretrained(folder)
    loaded = load_moe(folder, expert_memory="100%", predictor=None, device="cpu")
    with loaded.moeflow:
        yield loaded


def test_the_engine_of_packed_passes_runs_what_it_can_and_the_serial_one_the_rest(mixtral):
    assert type(engine_for(mixtral, max_batch_size=2)) is Engine
    engine = engine_for(build_model(FAMILIES["jamba"]), max_batch_size=3, max_waiting=1, max_step_tokens=8)
    assert type(engine) is SerialEngine
    for _ in range(4):
        engine.add(tokens(3), SamplingParams())
    with pytest.raises(QueueFullError):
        engine.add(tokens(3), SamplingParams())


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"kept_folder": "there"}, "kept_folder .* one sequence at a time"),
        ({"group_size": 2}, "group_size .* one sequence at a time"),
        ({"speculation": {"most": 0}}, "speculation most=0"),
        ({"kv_format": "int8"}, "kv_format=.* one sequence at a time"),
        ({"kv_policy": "pages"}, "kv_policy=.* one sequence at a time"),
    ],
)
def test_what_a_serial_engine_cannot_do_is_refused_by_name(jamba, tmp_path, monkeypatch, option, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=named):
        engine_for(jamba, **option)
    assert not list(tmp_path.iterdir())


def test_options_of_many_sequences_mean_nothing_to_a_serial_engine_and_others_are_obeyed(jamba):
    given = {"max_step_tokens": 64, "regrouping": False, "kept_folder": None, "kept_disk": "1GiB", "group_size": None}
    with engine_for(jamba, jump_forward=False, speculation={"most": 3}, **given) as engine:
        assert not engine._jump_forward
        assert not engine.stats()["speculation"]["on"]
        assert "keeps state" in engine.stats()["speculation"]["reason"]


def test_a_limit_that_makes_no_sense_is_refused(mixtral):
    with pytest.raises(ConfigError, match="max_batch_size"):
        engine_for(mixtral, max_batch_size=0)
