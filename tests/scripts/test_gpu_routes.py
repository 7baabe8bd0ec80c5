"""A trace's routes are what a random model's routers choose, and the report measures with them."""

import json

import numpy as np
import pytest
import torch

from gpu import routes
from gpu.end_to_end import run
from gpu.models import draw_prompt, folder_of, generate, loaded, shape_of
from gpu.routes import ForcedRoutes, choose_rows, open_routes
from helpers.small_traces import make_trace
from make_random_moe import write_random_moe
from moeflow.trace.trace import RoutingTrace

LAYERS, EXPERTS, TOP_K, ROWS = 3, 12, 3, 40


@pytest.fixture
def job(tmp_path):
    """The job of a dry run with recorded routes, and its model."""
    rng = np.random.default_rng(0)
    lines = [
        {"tok": n, "layers": [sorted(rng.permutation(EXPERTS)[:TOP_K].tolist()) for _ in range(LAYERS)]}
        for n in range(ROWS)
    ]
    lines[0]["layers"][0] = [0, 1, EXPERTS - 1]  # so that the largest number is there
    (tmp_path / "routes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = {"device": "cpu", "dry": True, "work": str(tmp_path), "routes": str(tmp_path / "routes.jsonl")}
    write_random_moe(folder_of(found, "bfloat16"), shape_of(found))
    return found


def test_models_have_the_experts_of_the_trace_and_a_token_takes_as_many_bytes(job):
    shape, usual = shape_of(job), shape_of({**job, "routes": None})
    assert (shape.layers, shape.experts, shape.top_k) == (2, EXPERTS, TOP_K)
    assert shape.inner == usual.inner * usual.top_k // TOP_K


def test_prompt_and_answer_take_the_rows_of_their_positions(job, tmp_path):
    trace = open_routes(job)
    with loaded(job, "bfloat16", expert_memory="50%", predictor="markov", trace=tmp_path / "seen") as model:
        forced = ForcedRoutes(model, trace, 16)
        generate(model, draw_prompt(model, 10), 12)  # the last positions begin again at the first row
        forced.remove()
        with torch.no_grad():
            model(draw_prompt(model, 16))
    seen = RoutingTrace.open(tmp_path / "seen").experts
    expected = trace.experts[np.arange(21) % 16][:, :2]
    assert np.array_equal(np.sort(seen[:21]), np.sort(expected))
    assert not np.array_equal(np.sort(seen[21:37]), np.sort(trace.experts[:16, :2]))


def test_a_residency_is_measured_with_routes_and_with_what_learns_them(job):
    rows = []
    case = {"format": "bfloat16", "share": "50%", "miss": "copy", "predictors": [None]}
    facts = run({**job, **case}, rows.append)
    assert facts["routes"] == job["routes"]
    assert [row["predictor"] for row in rows] == ["none", "markov"]
    assert all(row["same_tokens"] for row in rows)


def test_repetitions_and_duplicates_are_left_out(monkeypatch):
    trace = make_trace(num_sequences=4)
    trace.sequence_facts[0]["repetition"] = True
    monkeypatch.setattr(routes, "MIN_TOKENS", 1)
    rows = choose_rows(trace, 1000)
    assert rows.tolist() == np.arange(len(trace))[trace.sequences()[1].start :].tolist()
