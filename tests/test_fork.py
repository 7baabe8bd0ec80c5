"""After a fork: the child of a process that uses a model answers or refuses at once, and the parent goes on."""

import contextlib
import multiprocessing
import os
import threading

import pytest
import torch
import torch.distributed as dist

from helpers.engine_requests import GREEDY, NEW, PROMPTS, generated
from helpers.expert_runtimes import NUM_EXPERTS, build, fetch, write_experts
from helpers.forks import ANSWER_WITHIN_S, in_child
from helpers.small_tokenizers import letter_tokenizer
from moeflow.chat.answer import checkpoint_params, stream_answer
from moeflow.engine.engine import Engine
from moeflow.errors import ExpertReadError, ForkedProcessError, ParallelError
from moeflow.expert_parallel.ranks import RankGroup
from moeflow.fork import tell_of_forks
from moeflow.loading.load_moe import load_moe
from moeflow.trace.trace import RoutingTrace

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
PROMPT = torch.tensor([PROMPTS[1]])


@pytest.fixture
def load(mixtral_folder):
    """Load models whose passes leave two threads of OpenMP behind, which do not come along."""
    loaded = []

    def load(**options):
        torch.set_num_threads(2)
        loaded.append(load_moe(mixtral_folder, device="cpu", **{"expert_memory": "40%", **options}))
        return loaded[-1]

    yield load
    torch.set_num_threads(1)
    for model in loaded:
        model.moeflow.close()


@pytest.fixture
def experts_file(tmp_path):
    return write_experts(tmp_path / "experts.bin")


@pytest.fixture
def tokenizer():
    return letter_tokenizer()


def generate(model):
    return generated(model, PROMPTS[1])


def test_objects_that_live_are_told_in_the_child():
    class Told:
        in_process = os.getpid()

        def after_fork(self):
            self.in_process = os.getpid()

    told, gone = Told(), Told()
    tell_of_forks(told)
    tell_of_forks(gone)
    del gone

    def child():
        assert told.in_process == os.getpid() != os.getppid()

    assert in_child(child) == 0
    assert told.in_process == os.getpid()


@pytest.mark.parametrize("predictor", [None, "popularity"])
@pytest.mark.parametrize("first", [True, False])
def test_a_model_answers_in_the_child_and_its_child_and_goes_on_in_the_parent(load, mixtral, predictor, first):
    model, wanted = load(predictor=predictor), generated(mixtral, PROMPTS[1])
    if not first:
        assert generate(model) == wanted

    def child():
        assert generate(model) == wanted
        model.moeflow.check_integrity()
        assert in_child(lambda: generate(model) == wanted or os._exit(2)) == 0
        assert generate(model) == wanted
        model.moeflow.close()

    assert in_child(child) == 0
    assert generate(model) == wanted
    model.moeflow.check_integrity()


def test_a_fork_while_another_thread_generates(load, mixtral):
    model, wanted, stop, wrong = load(), generated(mixtral, PROMPTS[1]), threading.Event(), []

    def run():
        while not stop.is_set():
            if generate(model) != wanted:
                wrong.append("in the thread")

    def child():
        assert generate(model) == wanted
        model.moeflow.check_integrity()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert [in_child(child) for _ in range(8)] == [0] * 8
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert generate(model) == wanted


def test_a_fork_in_the_middle_of_a_fetch_fails_that_fetch_and_no_other(experts_file):
    path, values = experts_file
    with build(path, 4) as runtime:
        with contextlib.closing(runtime.fetch(0, list(range(NUM_EXPERTS)))) as fetched:
            next(fetched)

            def child():
                with contextlib.suppress(ExpertReadError):  # where it waited for a read
                    list(fetched)
                fetch(runtime, 0, list(range(NUM_EXPERTS)), values)
                runtime.check_integrity()

            assert in_child(child) == 0
            for _ in fetched:
                pass
        fetch(runtime, 1, [0, 1], values)
        runtime.check_integrity()


def test_a_prefetch_in_flight_is_read_again_in_the_child(experts_file):
    path, values = experts_file
    with build(path, 6) as runtime:
        fetched = runtime.fetch(0, [0, 1, 2, 3])
        next(fetched)
        fetched.close()  # the others are on their way, and no call waits for them

        def child():
            fetch(runtime, 0, [0, 1, 2, 3], values)
            runtime.check_integrity()

        assert in_child(child) == 0
        fetch(runtime, 0, [0, 1, 2, 3], values)


def test_an_engine_answers_in_the_child_with_the_requests_under_way(load, mixtral):
    wanted = [generated(mixtral, prompt) for prompt in PROMPTS]
    with Engine(load(), group_size=2, max_batch_size=6) as engine:
        assert [one.token_ids for one in engine.generate(PROMPTS, GREEDY)] == wanted
        ids = [engine.add(prompt, GREEDY) for prompt in PROMPTS]
        for _ in range(4):
            engine.step()

        def finish():
            ended = {}
            while not engine.finished:
                ended |= {one.id: one.completion.token_ids for one in engine.step() if one.completion}
            assert [ended[id] for id in ids] == wanted
            engine.close()

        assert in_child(finish) == 0
        finish()


def test_a_trace_is_the_parents_and_the_child_refuses(load, tmp_path):
    path = tmp_path / "trace"
    model = load(trace=path)
    generate(model)

    def child():
        with pytest.raises(ForkedProcessError, match="without trace="):
            generate(model)
        model.moeflow.close()

    assert in_child(child) == 0
    generate(model)
    model.moeflow.close()
    assert len(RoutingTrace.open(path).sequence) == 2 * (len(PROMPTS[1]) + NEW - 1)


def test_an_answer_under_way_is_the_parents(load, tokenizer):
    model = load()
    params = checkpoint_params(model, max_new_tokens=8, temperature=0.0)
    with stream_answer(model, tokenizer, PROMPT, params) as answer:

        def child():
            with pytest.raises(ForkedProcessError, match="another answer"):
                list(answer)
            answer.close()

        assert in_child(child) == 0
        assert "".join(answer) == answer.answer.text


def test_a_model_on_a_gpu_refuses_in_the_child(experts_file):
    with build(experts_file[0], 6) as runtime:
        runtime.device = torch.device("cuda:0")

        def child():
            for call in (lambda: runtime.begin_forward(1, 1, continues=False), lambda: list(runtime.fetch(0, [0]))):
                with pytest.raises(ForkedProcessError, match=r"cuda:0 .* spawn"):
                    call()
            runtime.close()

        assert in_child(child) == 0


def test_a_rank_is_not_the_forks(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        ranks = RankGroup(None, torch.device("cpu"))

        def child():
            with pytest.raises(ParallelError, match="spawn"):
                ranks.check()

        assert in_child(child) == 0
        ranks.check()
    finally:
        dist.destroy_process_group()


def _answer(folder, answers, model=None):
    model = model or load_moe(folder, device="cpu", expert_memory="40%")
    answers.put(generate(model))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_of_multiprocessing_answer(load, mixtral, mixtral_folder, method):
    context, model = multiprocessing.get_context(method), load()
    answers = context.Queue()
    wanted = generate(model)
    arguments = (mixtral_folder, answers, model) if method == "fork" else (mixtral_folder, answers)
    processes = [context.Process(target=_answer, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=ANSWER_WITHIN_S) for _ in processes] == [wanted] * 2
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert generate(model) == wanted == generated(mixtral, PROMPTS[1])


class _Logits(torch.utils.data.Dataset):
    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 4

    def __getitem__(self, number):
        return generated(self.model, PROMPTS[number])


@pytest.mark.slow
def test_workers_of_a_data_loader_answer(load, mixtral):
    loader = torch.utils.data.DataLoader(_Logits(load()), batch_size=None, num_workers=2, timeout=ANSWER_WITHIN_S)
    assert list(loader) == [generated(mixtral, prompt) for prompt in PROMPTS[:4]]
