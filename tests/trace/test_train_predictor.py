"""Training on a trace never sees the held-out sequences, and what cannot be trained or opened is refused."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from helpers.small_traces import make_trace
from moeflow.errors import ConfigError, PredictorError
from moeflow.predictors.files import load_predictor
from moeflow.predictors.training import TrainingOptions
from moeflow.trace.train_predictor import open_predictor, split_sequences, trace_routes, train_predictor

TINY = {"width": 8, "token_width": 4, "later_rank": 4}
ONE_EPOCH = TrainingOptions(epochs=1, batch_size=4)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_every_fifth_sequence_that_is_no_duplicate_is_held_out():
    training, held_out = split_sequences(make_trace(12, duplicates=(1, 3)))
    assert held_out == [6, 11]
    assert training == [0, 2, 4, 5, 7, 8, 9, 10]


def test_a_trace_with_too_few_sequences_is_refused():
    with pytest.raises(ConfigError, match=r"4 sequence\(s\), too few to hold out every 5th"):
        split_sequences(make_trace(4))
    with pytest.raises(ConfigError, match="hold_out is 1"):
        split_sequences(make_trace(12), 1)


@pytest.mark.parametrize("kind", ["path", "sequence"])
def test_held_out_sequences_have_no_influence_on_training(kind, tmp_path):
    sizes = TINY if kind == "sequence" else {"num_rows": 16, "width": 8, "inner_width": 8, "num_heads": 2}
    trace, changed = make_trace(), make_trace()
    for place in split_sequences(trace)[1]:
        changed._rows["experts"][changed.sequences()[place]] = (0, 1)
    written = []
    for number, one in enumerate((trace, changed)):
        train_predictor(one, kind, tmp_path / str(number), options=ONE_EPOCH, **sizes)
        written.append(load_file(tmp_path / str(number)))
    for name, array in written[0].items():
        np.testing.assert_array_equal(array, written[1][name])


def test_a_trained_file_says_what_it_was_trained_on(tmp_path):
    trace = make_trace()
    card = train_predictor(trace, "sequence", tmp_path / "p", hold_out=4, options=ONE_EPOCH, **TINY)
    assert load_predictor(tmp_path / "p")[1] == card
    routes = trace_routes(trace, split_sequences(trace, 4)[0])
    assert card.fingerprint == "model-a"
    assert card.trained_on == {"trace": "trace", "sequences": 9, "tokens": routes.num_tokens, "hold_out": 4}
    assert open_predictor(tmp_path / "p", trace)[1] == 4


def test_training_that_is_interrupted_leaves_no_file(tmp_path):
    def interrupt(share, text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_predictor(make_trace(), "sequence", tmp_path / "p", options=ONE_EPOCH, progress=interrupt, **TINY)
    assert not list(tmp_path.iterdir())


def test_progress_goes_from_begin_to_end_without_falling_back(tmp_path):
    shares = []
    train_predictor(
        make_trace(),
        "sequence",
        tmp_path / "p",
        options=TrainingOptions(epochs=2, batch_size=4),
        progress=lambda share, text: shares.append(share),
        **TINY,
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_wrong_options_are_named(tmp_path):
    with pytest.raises(ConfigError, match="'oracle' cannot be trained"):
        train_predictor(make_trace(), "oracle", tmp_path / "p")
    with pytest.raises(ConfigError, match="epochs is 0"):
        TrainingOptions(epochs=0)
    with pytest.raises(ConfigError, match="device 'abacus'"):
        train_predictor(make_trace(), "path", tmp_path / "p", options=TrainingOptions(device="abacus"))
    with pytest.raises(PredictorError, match="No such file or directory"):
        train_predictor(make_trace(), "path", tmp_path / "no" / "p")
    with pytest.raises(PredictorError, match="Is a directory"):
        train_predictor(make_trace(), "path", tmp_path)
    with pytest.raises(ConfigError, match="seed is -1"):
        TrainingOptions(seed=-1)


def test_a_predictor_of_another_model_is_not_opened(tmp_path):
    train_predictor(make_trace(), "sequence", tmp_path / "p", options=ONE_EPOCH, **TINY)
    with pytest.raises(PredictorError, match="model model-a, and model model-b is wanted"):
        open_predictor(tmp_path / "p", make_trace(fingerprint="model-b"))


def test_lookahead_is_opened_only_where_the_trace_holds_one():
    with pytest.raises(ConfigError, match="holds no lookahead"):
        open_predictor("lookahead", make_trace())
    predictor, _ = open_predictor("lookahead", make_trace(lookahead=(2, 4)))
    assert predictor.reach == 2
