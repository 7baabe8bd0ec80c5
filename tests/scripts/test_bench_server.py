"""The server's benchmark: what it takes from a trace, what it counts as in time, and that it runs through."""

import json
import sys

import pytest

import bench_server
from bench.server import arrivals
from bench.server.arrivals import Arrival, Limits, figures, read_arrivals, stretched
from bench.server.clients import Answer
from bench.server.process import ServerProcess
from bench.server.structure import SCHEMAS, schema_of, verdict
from helpers.servers import TEMPLATE, small_model
from helpers.small_tokenizers import byte_tokenizer

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,9000,1
2023-11-16 18:15:54.6805900,8,4000
2023-11-16 18:16:00.0000000,8,8
"""
LIMITS = Limits(slack=5, base_s=0.1, token_s=0.001, tpot_s=0.02)
SOON = Answer(due_s=10, first_s=10.5, last_s=11.3, num_tokens=10, text="")  # TTFT .5, TPOT .09


def test_recorded_lengths_are_scaled_and_kept_within_bounds():
    recorded = read_arrivals(TRACE.splitlines(), 3)
    assert [one[1:] for one in recorded] == [(94, 11), (512, 4), (16, 64)]
    assert [one.at_s for one in recorded] == pytest.approx([0, 4.314579, 8])


def test_arrivals_are_stretched_in_proportion():
    recorded = read_arrivals(TRACE.splitlines(), 3)
    assert stretched(recorded, 16) == pytest.approx([0, 8.629158, 16])
    assert stretched(recorded[:1], 16) == [0]


@pytest.mark.parametrize(
    ("changes", "prompt_tokens", "holds"),
    [
        ({}, 10, True),
        ({"first_s": 10.6}, 10, False),  # most .55 s behind ten tokens of a prompt
        ({"first_s": 10.6, "last_s": 11.4}, 100, True),
        ({"last_s": 11.5}, 10, False),
        ({"last_s": 10.5, "num_tokens": 1}, 10, True),
        ({"due_s": 9.0}, 10, False),  # what it waited before it was sent counts
    ],
)
def test_what_is_in_time_depends_on_first_and_later_tokens(changes, prompt_tokens, holds):
    assert LIMITS.hold(Arrival(0, prompt_tokens, 10), SOON._replace(**changes)) is holds


def test_goodput_is_the_share_of_requests_in_time():
    recorded = [Arrival(0, 10, 10)] * 4
    late = SOON._replace(due_s=5)
    assert figures(recorded, [SOON, late, SOON, SOON], LIMITS)["goodput"] == 0.75


def test_an_answer_is_valid_if_its_own_schema_allows_it():
    assert verdict('{"name": "Ada", "age": 7}', 0) == "valid"
    assert verdict('{"name": "Ada", "age": 7}', len(SCHEMAS)) == "valid"
    assert verdict('{"name": "Ada"}', 0).startswith("ValidationError")
    assert verdict('{"name": "Ada", "age"', 0).startswith("JSONDecodeError")
    assert verdict('{"name": "Ada", "age": 7}', 1).startswith("ValidationError")
    assert len(schema_of(9)["properties"]) == 20


def test_figures_that_there_are_not_are_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        bench_server.parse_arguments(["--only", "soak,speed"])
    assert "'speed' is none of second-turn" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    small_model(vocab_size=300).save_pretrained(folder)
    byte_tokenizer(eos_token="<|end|>", chat_template=TEMPLATE).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_figure_has_its_baseline_and_the_last_line_is_json(folder, capsys):
    sizes = {"rounds": 1, "conversation": 200, "clients": 3, "tokens": 6, "threads": 1}
    options = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    only = ["--only", "second-turn,throughput", "--memory", "50%"]
    assert bench_server.main(["--model", str(folder), *only, *options]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    turn = found["second-turn"]
    assert turn["same_tokens"] is True
    assert turn["cached_tokens"]["min"] >= 200
    assert turn["ratio"]["median"] == pytest.approx(turn["second_s"]["median"] / turn["first_s"]["median"])
    speed = found["throughput"]
    rates = speed["http_tokens_per_s"]["median"], speed["generate_tokens_per_s"]["median"]
    assert speed["ratio"] == pytest.approx(rates[0] / rates[1])
    assert speed["loop_ms_per_token"]["median"] > 0


def test_a_server_that_cannot_start_says_why():
    with (
        pytest.raises(OSError, match=r"ended with 1: .*no folder of a model"),
        ServerProcess([sys.executable, "-c", "raise SystemExit('no folder of a model')", "{port}"], 1),
    ):
        pass


def test_arrivals_without_a_trace_are_skipped_in_one_line(folder, tmp_path):
    options = bench_server.parse_arguments(["--model", str(folder), "--requests", str(tmp_path / "none.csv")])
    (line,) = arrivals.lines(arrivals.measure(options))
    assert "give --requests" in line


def test_without_its_python_llama_cpp_is_skipped_by_name(folder):
    options, skipped = bench_server.parse_arguments(["--model", str(folder)]), {}
    assert arrivals.sides(options, skipped).keys() == {"moeflow", "first come, without chunks"}
    assert "give --llama-python" in skipped["llama.cpp, all resident"]
