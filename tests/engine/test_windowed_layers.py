"""Layers with a window hold what they still need, and answers are those of models that keep everything."""

import pytest
import torch

from helpers.engine_requests import GREEDY, NEW, assert_empty, generated, tokens
from helpers.window_models import LAYER_BYTES, WINDOW, chunked_model, windowed_model
from moeflow import Engine, SamplingParams, load_moe
from moeflow.engine.kv_cache.windows import MARGIN
from moeflow.engine.model_runner import ModelRunner
from moeflow.engine.sequence import Piece
from moeflow.kernels.cpu.library import instruction_set

STEP = 16  # tokens in a pass
SPARE = 64  # positions behind the tokens that there are
MOST = WINDOW + MARGIN + STEP + SPARE  # that a layer with a window has at once
AHEAD = 2 * (WINDOW + MARGIN)  # those before a place where others may go on, behind the prompt's end


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return windowed_model()


def run(engine):
    """Step to the end, checking all the way; return the completions by id."""
    found = {}
    while not engine.finished:
        found |= {one.id: one.completion for one in engine.step() if one.completion}
        engine.check_integrity()
    return found


def positions_in(engine, id):
    """Positions that a running sequence has room for in each layer, with what it has set aside."""
    slot = engine._memory[id]
    aside = sum(part.end - part.begin for part in slot.aside)
    return [keys.shape[2] + aside * (layer % 2 == 0) for layer, keys in sorted(slot.keys.items())]


@pytest.mark.slow
@pytest.mark.parametrize("num_prompt", [30, 300])
def test_layers_with_a_window_hold_no_more_than_that_and_a_piece_and_answers_are_those_of_generate(model, num_prompt):
    prompt, num_new = tokens(num_prompt, 1), 110
    with Engine(model, max_batch_size=2, max_step_tokens=STEP) as engine:
        engine.add(prompt, SamplingParams(max_new_tokens=num_new, ignore_eos=True), id="long")
        found, most = {}, 0
        while not engine.finished:
            found |= {one.id: one.completion for one in engine.step() if one.completion}
            engine.check_integrity()
            if not engine.finished:
                windowed, whole, *same = positions_in(engine, "long")
                assert same == [windowed, whole]
                assert whole >= engine._memory._slots["long"].num_positions
                most = max(most, windowed)
        assert found["long"].token_ids == generated(model, prompt, num_new)
        assert most <= MOST + AHEAD
        assert_empty(engine)


def test_bytes_of_a_long_sequence_are_half_of_those_of_all_positions(model):
    with Engine(model, max_batch_size=1, max_step_tokens=STEP) as engine:
        held = []
        for count in (400, 800):
            engine.add(tokens(count, count), GREEDY)
            while not engine.stats()["new_tokens"] % NEW:
                engine.step()
            held.append(engine.stats()["kv_used_bytes"])
            run(engine)
        assert held[1] - held[0] == 400 * 2 * LAYER_BYTES, "two layers of four grow"
        assert held[1] < 0.6 * 800 * engine.stats()["kv_position_bytes"]


def test_twice_as_long_a_request_fits_into_the_memory(model):
    all_positions = 400 * 4 * LAYER_BYTES
    with Engine(model, max_batch_size=1, max_step_tokens=STEP, kv_memory=all_positions) as engine:
        prompt = tokens(700, 1)
        (completion,) = engine.generate([prompt], GREEDY)
        assert completion.token_ids == generated(model, prompt)
        assert engine.stats()["kv_peak_bytes"] <= all_positions


def turn(engine, model, prompt, num_new=NEW):
    """Answer a prompt, check the answer, and return it with the number of tokens that were kept."""
    (completion,) = engine.generate([prompt], SamplingParams(max_new_tokens=num_new, ignore_eos=True))
    assert completion.token_ids == generated(model, prompt, num_new)
    assert_empty(engine)
    return completion.token_ids, completion.cached_tokens


def test_conversations_go_on_where_a_window_is_kept(model):
    with Engine(model, max_batch_size=2, max_step_tokens=STEP) as engine:
        first, num_new = tokens(100, 1), 70  # more than the margin before the answer's end reaches
        answer, _ = turn(engine, model, first, num_new)
        assert turn(engine, model, [*first, *answer, *tokens(90, 2)])[1] == 100 + num_new - 1
        assert turn(engine, model, first)[1] == 99, "the same again"
        assert turn(engine, model, [*first, *tokens(9, 3)])[1] == 100, "without the answer"
        assert turn(engine, model, [*first[:80], *tokens(9, 4)])[1] == 80, "a little before the end of the prompt"


def test_where_prompts_part_without_a_window_it_is_computed_once_more_and_then_kept(model):
    begin = tokens(200, 1)
    with Engine(model, max_batch_size=2, max_step_tokens=STEP) as engine:
        cached = [turn(engine, model, [*begin, *tokens(60, seed)])[1] for seed in (2, 3, 4, 5)]
        assert cached == [0, 0, 200, 200]
        assert engine.stats()["kv_kept_tokens"] == 200 + 4 * (60 + NEW - 1), "no token is kept twice"


@pytest.mark.parametrize(("max_batch_size", "parted"), [(1, 0), (5, 140)])
def test_equal_prompts_and_beginnings_under_way_are_computed_once(model, max_batch_size, parted):
    begin = tokens(250, 1)
    prompts = [*[[*begin, 5]] * 3, [*begin, *tokens(40, 2)], [*begin[:140], *tokens(70, 3)]]
    with Engine(model, max_batch_size=max_batch_size, max_step_tokens=64) as engine:
        ids = [engine.add(prompt, GREEDY) for prompt in prompts]
        found = run(engine)
        assert [found[id].token_ids for id in ids] == [generated(model, prompt) for prompt in prompts]
        assert [found[id].cached_tokens for id in ids] == [0, 250, 250, 250, parted]
        assert_empty(engine)


@pytest.mark.slow
@pytest.mark.parametrize("moves", [False, True])
def test_requests_that_give_way_go_on_as_if_nothing_had_happened(model, moves):
    prompts, num_new = [tokens(20 + 5 * seed, seed) for seed in range(4)], 100
    params = SamplingParams(max_new_tokens=num_new, ignore_eos=True)
    with Engine(model, max_batch_size=5, max_step_tokens=STEP, kv_memory=250 * 4 * LAYER_BYTES) as engine:
        engine._memory._moved.allowed = moves
        engine._memory.speeds.saw_prefill(1, 1e9)  # so that moving is cheaper, whatever is measured meanwhile
        ids = [engine.add(prompt, params) for prompt in prompts]
        found = run(engine)
        assert [found[id].token_ids for id in ids] == [generated(model, prompt, num_new) for prompt in prompts]
        stats = engine.stats()
        assert stats["preempted"] > 0
        assert moves or stats["moved"] == 0  # those that give way find room in the tree here, and need not move
        assert stats["kv_peak_bytes"] <= 250 * 4 * LAYER_BYTES
        assert_empty(engine)


@pytest.mark.slow
def test_a_sequence_alone_runs_in_the_least_memory_that_it_may_have(model):
    prompt, num_new = tokens(30, 1), 100
    with Engine(model, max_batch_size=2, max_step_tokens=STEP) as engine:
        least = engine._memory.sizes.bytes_of(len(prompt) + num_new - 1)
    with Engine(model, max_batch_size=2, max_step_tokens=STEP, kv_memory=least) as engine:
        ids = [engine.add(prompt, SamplingParams(max_new_tokens=num_new, ignore_eos=True)) for _ in range(2)]
        found = run(engine)
        assert [found[id].token_ids for id in ids] == [generated(model, prompt, num_new)] * 2
        too_long = engine.add(prompt, SamplingParams(max_new_tokens=num_new + 1))
        assert "take" in run(engine)[too_long].error


def test_windows_live_through_a_restart(model, tmp_path):
    first = tokens(100, 1)
    with Engine(model, max_batch_size=2, max_step_tokens=STEP) as engine:
        answer, _ = turn(engine, model, first)
        turn(engine, model, [*first[:60], *tokens(50, 2)])
        assert engine.save_kept(tmp_path) == engine.stats()["kv_kept_tokens"]
        kept = engine.stats()["kv_kept_bytes"]
    with Engine(model, max_batch_size=2, max_step_tokens=STEP) as engine:
        engine.load_kept(tmp_path)
        assert engine.stats()["kv_kept_bytes"] == kept
        assert turn(engine, model, [*first, *answer, 7, 8])[1] == 100 + NEW - 1
        assert turn(engine, model, [*first[:60], 9, 9])[1] == 60


def test_chunked_layers_hold_a_chunk_and_answers_are_those_of_generate():
    model = chunked_model()
    with Engine(model, max_batch_size=3, max_step_tokens=STEP) as engine:
        assert engine._memory.sizes.window == 16
        prompts = [tokens(count, count) for count in (3, 20, 150)]
        ids = [engine.add(prompt, GREEDY) for prompt in prompts]
        found = run(engine)
        assert [found[id].token_ids for id in ids] == [generated(model, prompt) for prompt in prompts]
        assert turn(engine, model, [*prompts[2], *found[ids[2]].token_ids, 4, 5])[1] == 150 + NEW - 1


def logits_of(model, prompts, num_tokens, most_new):
    """Logits of passes over all sequences; windows move only where there is a limit of new tokens."""
    runner, found = ModelRunner(model, 1 << 24, most_new=most_new), []
    sequences = [runner.sequence(str(number), prompt, num_tokens) for number, prompt in enumerate(prompts)]
    assert all(runner.memory.admit(one) for one in sequences)
    while len(sequences[0].token_ids) < num_tokens:
        assert all(runner.memory.grow(one) for one in sequences)
        pieces = [Piece(one, one.uncomputed(STEP), True) for one in sequences]
        for piece, one in zip(pieces, runner.run(pieces), strict=True):
            assert one.error is None
            found.append(one.logits)
            piece.sequence.num_computed += len(piece.tokens)
            if piece.sequence.num_computed == piece.sequence.length:
                piece.sequence.append(int(one.logits[-1].argmax()))
    moved = {runner.memory[one.id].in_window[0] > 0 for one in sequences}
    return torch.cat(found), moved


@pytest.mark.slow
@pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
@pytest.mark.parametrize("step", ["python", "auto"])
def test_every_bit_is_that_of_layers_that_keep_all_positions(model, tmp_path, step):
    model.save_pretrained(tmp_path)
    loaded = load_moe(tmp_path, expert_memory="100%", predictor=None, step=step, device="cpu")
    prompts = [tokens(80, 1), tokens(75, 2), tokens(70, 3)]
    with loaded.moeflow:
        kept, moved = logits_of(loaded, prompts, 90, None)
        assert moved == {False}
        steps = loaded.moeflow.step.num_steps if step == "auto" else 0
        limited, moved = logits_of(loaded, prompts, 90, STEP)
        assert moved == {True}
        assert torch.equal(kept, limited)
        assert (steps > 0) == (step == "auto")
