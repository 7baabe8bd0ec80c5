"""Every model that generates token by token gets an engine, and the same requests wait at most."""

import pytest

from helpers.engine_requests import tokens
from helpers.families import FAMILIES
from helpers.family_models import build_model
from moeflow.engine.engine import Engine
from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.serial.choose_engine import engine_for
from moeflow.engine.serial.serial_engine import SerialEngine
from moeflow.errors import ConfigError, QueueFullError


def test_the_engine_of_packed_passes_runs_what_it_can_and_the_serial_one_the_rest(mixtral):
    assert type(engine_for(mixtral, max_batch_size=2)) is Engine
    engine = engine_for(build_model(FAMILIES["jamba"]), max_batch_size=3, max_waiting=1, max_step_tokens=8)
    assert type(engine) is SerialEngine
    for _ in range(4):
        engine.add(tokens(3), SamplingParams())
    with pytest.raises(QueueFullError):
        engine.add(tokens(3), SamplingParams())


def test_a_limit_that_makes_no_sense_is_refused(mixtral):
    with pytest.raises(ConfigError, match="max_batch_size"):
        engine_for(mixtral, max_batch_size=0)
