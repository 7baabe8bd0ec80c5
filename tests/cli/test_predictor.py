"""`moeflow predictor` as a user types it."""

import json

import pytest

from helpers.small_traces import make_trace
from moeflow.cli.main import main
from moeflow.predictors.files import load_predictor
from moeflow.trace.writer import TraceWriter


@pytest.fixture
def trace(tmp_path):
    """A small trace file."""
    made = make_trace(10)
    with TraceWriter(tmp_path / "t", made.format, sequence_facts=made.sequence_facts) as writer:
        writer.write(made._rows)
    return tmp_path / "t"


def test_train_then_eval_prints_the_agreed_keys(trace, tmp_path, capsys):
    assert main(["predictor", "train", str(trace), "--kind", "path", "-o", str(tmp_path / "p"), "--epochs", "1"]) == 0
    assert "trained on" in capsys.readouterr().out
    assert main(["predictor", "eval", str(tmp_path / "p"), str(trace), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    for name in ("all_layers", "next_layer"):
        assert {"recall@4", "recall@6", "recall@8", "precision@4"} <= set(figures[name])
    assert figures["sequences"] == 2


def test_train_tells_what_it_wrote_as_json(trace, tmp_path, capsys):
    options = ["--epochs", "1", "--seed", "7", "--hold-out", "2", "--json"]
    assert main(["predictor", "train", str(trace), "-o", str(tmp_path / "p"), *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["seed"], told["trained_on"]["hold_out"]) == ("sequence", 7, 2)
    assert load_predictor(tmp_path / "p")[1].seed == 7


def test_eval_measures_a_baseline_on_the_held_out_or_on_all(trace, capsys):
    counted = []
    for options in ([], ["--all"]):
        assert main(["predictor", "eval", "popularity", str(trace), "--json", *options]) == 0
        counted.append(json.loads(capsys.readouterr().out)["sequences"])
    assert counted == [2, 10]
    assert main(["predictor", "eval", "markov", str(trace)]) == 0
    assert "next layer in the step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "nowhere", "{trace}"], "nowhere cannot be read as a predictor"),
        (["eval", "{trace}", "{trace}"], "is no predictor's file"),
        (["eval", "popularity", "nowhere"], "nowhere"),
        (["train", "{trace}", "-o", "{trace}.p", "--epochs", "0"], "epochs is 0"),
        (["train", "{trace}", "-o", "{trace}.p", "--hold-out", "11"], "too few to hold out every 11th"),
        (["train", "{trace}", "-o", "{trace}.p", "--device", "abacus"], "device 'abacus' is not here"),
    ],
)
def test_mistakes_are_told_in_one_line(trace, capsys, arguments, message):
    assert main(["predictor", *(argument.format(trace=trace) for argument in arguments)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert message in told.err
    assert told.err.count("\n") == 1
