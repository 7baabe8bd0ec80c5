"""Threads in any mix on one model: generate, engines and chat answers give each the tokens that it gets alone."""

import threading

import pytest
import torch

from helpers.engine_requests import GREEDY, PROMPTS, assert_empty, generated
from helpers.forks import in_child
from helpers.small_tokenizers import letter_tokenizer
from moeflow.chat.answer import checkpoint_params, stream_answer
from moeflow.engine.engine import Engine
from moeflow.errors import ClosedModelError, ForkedProcessError
from moeflow.loading.load_moe import load_moe
from moeflow.turns import Turns

pytestmark = pytest.mark.slow

ROUNDS = 6
CLOSED = [("this engine", "make another."), ("the model", "load it again to use it.")]


@pytest.fixture(scope="module")
def wanted(mixtral):
    return [generated(mixtral, prompt) for prompt in PROMPTS]


@pytest.fixture(params=[None, "popularity"])
def model(request, mixtral_folder):
    torch.set_num_threads(1)
    model = load_moe(mixtral_folder, device="cpu", expert_memory="40%", predictor=request.param)
    yield model
    model.moeflow.check_integrity()
    prediction = model.moeflow.stats()["prediction"]
    assert prediction is None or prediction["failure"] is None
    model.moeflow.close()


def run_together(*works):
    """Run each in a thread of its own; raise what one of them raised."""
    raised, begin = [], threading.Barrier(len(works))

    def run(work):
        try:
            begin.wait()
            for _ in range(ROUNDS):
                work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def generating(model, wanted, number):
    def work():
        assert generated(model, PROMPTS[number]) == wanted[number]

    return work


def stepping(engine, wanted):
    def work():
        completions = engine.generate(PROMPTS, GREEDY)
        assert [one.error or one.token_ids for one in completions] == wanted

    return work


def answering(model, wanted, number):
    tokenizer = letter_tokenizer()
    params = checkpoint_params(model, max_new_tokens=GREEDY.max_new_tokens, temperature=0.0)

    def work():
        with stream_answer(model, tokenizer, torch.tensor([PROMPTS[number]]), params) as answer:
            text = "".join(answer)
        assert text == answer.answer.text
        assert answer.answer.num_new_tokens <= len(wanted[number])

    return work


def test_generate_engines_and_the_chat_in_threads(model, wanted):
    with Engine(model) as first, Engine(model, group_size=2, max_batch_size=4) as second:
        run_together(
            generating(model, wanted, 1),
            generating(model, wanted, 4),
            stepping(first, wanted),
            stepping(second, wanted),
            answering(model, wanted, 2),
        )
        assert_empty(first)
        assert_empty(second)


def test_threads_share_an_engine(model, wanted):
    with Engine(model, group_size=2) as engine:
        added = []

        def add_and_step():
            added.append(engine.add(PROMPTS[0], GREEDY))
            ended = []
            while added[-1] not in ended:
                ended += [one.id for one in engine.step() if one.completion]
                assert all(one in added for one in ended)

        run_together(stepping(engine, wanted), stepping(engine, wanted), add_and_step)
        assert_empty(engine)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_engines_beside_generate_on_a_model_of_transformers(mixtral, wanted, implementation):
    before = mixtral.config._attn_implementation
    mixtral.set_attn_implementation(implementation)
    try:
        with Engine(mixtral) as first, Engine(mixtral) as second:
            run_together(stepping(first, wanted), stepping(second, wanted), generating(mixtral, wanted, 3))
        assert mixtral.config._attn_implementation == implementation
    finally:
        mixtral.set_attn_implementation(before)


def test_a_fork_while_engines_step(model, wanted):
    stop, raised = threading.Event(), []
    with Engine(model) as engine, Engine(model) as idle:

        def run():
            try:
                while not stop.is_set():
                    stepping(engine, wanted)()
            except BaseException as error:
                raised.append(error)

        def child():
            try:
                stepping(engine, wanted)()
            except ForkedProcessError as error:
                engine.close()
                if "make another engine" not in str(error):
                    raise
            stepping(idle, wanted)()
            generating(model, wanted, 2)()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert [in_child(child) for _ in range(4)] == [0] * 4
        finally:
            stop.set()
            thread.join()
    assert not raised


def test_close_in_another_thread_ends_what_runs(mixtral_folder, wanted):
    model = load_moe(mixtral_folder, device="cpu", expert_memory="40%")
    engine, ended, begun = Engine(model), [], threading.Barrier(3)

    def run(work):
        work()
        begun.wait()
        try:
            while True:
                work()
        except ClosedModelError as error:
            ended.append(str(error))

    threads = [
        threading.Thread(target=run, args=[work]) for work in (stepping(engine, wanted), generating(model, wanted, 0))
    ]
    for thread in threads:
        thread.start()
    begun.wait()
    engine.close()
    threads[0].join()
    model.moeflow.close()
    threads[1].join()
    assert ended == [f"{what} was closed: {do}" for what, do in CLOSED]


def test_turns_go_to_threads_that_wait():
    turns, order = Turns(), []
    waits = threading.Event()

    def other():
        waits.set()
        turns.run(order.append, "other")

    thread = threading.Thread(target=other)

    def first():
        thread.start()
        waits.wait()
        turns.run(order.append, "again")  # the thread that has the turn may take it again

    turns.run(first)
    while "other" not in order:
        turns.run(order.append, "mine")
    thread.join()
    assert order[0] == "again"


def test_an_error_leaves_the_turn_free():
    turns = Turns()

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        turns.run(fail)
    thread = threading.Thread(target=turns.run, args=[list])
    thread.start()
    thread.join()
    assert turns.renew()
