"""Expert parallelism: the experts of a `load_moe` model spread over the ranks of a torch.distributed group by a plan.

Every rank has the dense parts and its own tokens; it reads and runs only the experts that the plan gives it.

The protocol. Ranks meet in rounds and wait for nothing else. In a round every rank sends each other rank a header: its
state and, where one of its layers asks for experts, the layer, the size and dtypes of rows, and the number of rows for
each expert. Then

- if any rank has failed, each sends its error text, and all raise;
- if all ranks are done, the session ends;
- else hidden states go to the ranks that hold the experts (dispatch), which run them, and outputs come back (combine),
  behind a mark of success or failure; if one failed, each sends its error text, and all raise.

A rank that has no more tokens is "done" and answers the others' rounds until all are. Since a header names its layer,
ranks need not be in the same layer or pass: prompts and answers may differ in length, and a rank may leave layers out.
Where they are in the same layer, as they are while all run the same model, an expert sees the rows of all at once.

torch.distributed notices a rank whose process dies: the others raise as soon as its connection closes, or
at the process group's timeout.
"""

import hashlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from moeflow.errors import ConfigError, MoeflowError, ParallelError, PlacementError
from moeflow.expert_parallel.ranks import RankGroup
from moeflow.expert_parallel.replicas import ReplicaTable
from moeflow.expert_parallel.round import ASKS, DONE, Request, Rounds
from moeflow.expert_parallel.traffic import Traffic
from moeflow.hf import experts_interface
from moeflow.hf.fingerprint import model_fingerprint
from moeflow.moe.experts import OffloadedExperts
from moeflow.offload.runtime import ExpertRuntime
from moeflow.placement.files.plan import read_plan
from moeflow.placement.plan import Plan

if TYPE_CHECKING:
    import torch.distributed as dist
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)


def apply(
    model: "PreTrainedModel", plan: Plan | str | Path | None = None, group: "dist.ProcessGroup | None" = None
) -> "ExpertParallel":
    """Spread a model's experts over the ranks of a group. All ranks must call it, on the same checkpoint and plan.

    Afterwards the model runs only inside `with model.moeflow.parallel.session():`, and a rank reads only the experts
    that the plan gives it; load_moe's budget stays the budget.

    Args:
        model: from load_moe, with predictor=None.
        plan: a plan for as many GPUs as the group has ranks, or the file of one; None for equal parts in the order of
            the experts.
        group: a torch.distributed group; None for all processes.

    Returns:
        The model's `ExpertParallel`, also `model.moeflow.parallel`.

    Raises:
        ConfigError: torch.distributed is not started or its backend not the device's, or the model was not loaded so.
        PlacementError: the plan is not of this model or number of ranks.
        ParallelError: another rank refused, or has another model or plan.
    """
    runtime: ExpertRuntime | None = getattr(model, "moeflow", None)
    if runtime is None:
        raise ConfigError("expert parallelism takes a model that load_moe returned.")
    ranks = RankGroup(group, runtime.device)
    ranks.check()
    followed, refused = None, None
    try:
        followed = _checked_plan(model, runtime, plan, ranks.world_size)
        said = _digest(model, runtime, followed)
    except MoeflowError as error:
        refused, said = error, f"!{error}"
    told = ranks.texts(said)
    if followed is None or refused is not None:
        assert refused is not None, "no plan and no reason"
        raise refused
    for rank, text in enumerate(told):
        if text.startswith("!"):
            raise ParallelError(f"rank {rank} cannot take part: {text[1:]}")
        if text != said:
            raise ParallelError(
                f"rank {rank} has another model, dtype, quantisation or plan than rank {ranks.rank}. Load the same "
                "checkpoint with the same options on all ranks, and give all the same plan."
            )
    experts = [cast(OffloadedExperts, module._moeflow) for _, module in experts_interface.experts_modules(model)]
    spread = runtime.parallel = ExpertParallel(experts, followed, ranks)
    for layer, served in enumerate(experts):
        served.use(outputs_of=partial(spread.outputs, layer))
    return spread


class ExpertParallel:
    """`model.moeflow.parallel`: runs this rank's part of the plan, for itself and for the others.

    Args:
        experts: [L], the model's.
        plan: for as many GPUs as there are ranks.
        ranks: the group.
    """

    def __init__(self, experts: list[OffloadedExperts], plan: Plan, ranks: RankGroup) -> None:
        self.plan = plan
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self._tables = [ReplicaTable(layer, ranks.rank, ranks.world_size) for layer in plan.experts]
        self._ranks = ranks
        self._rounds = Rounds(experts, plan.num_experts, ranks)
        self._traffic = Traffic(plan.num_layers, ranks.world_size)
        self._in_session = False
        self._lock = threading.Lock()

    @contextmanager
    def session(self) -> Iterator["ExpertParallel"]:
        """Run the model any number of times, each rank on its own tokens; it ends when all ranks have reached its end.

        All ranks must open it, even those without tokens. An exception inside it is sent to the others, which
        raise ParallelError. Afterwards the ranks can open another.

        Raises:
            ParallelError: another rank failed or was lost.
            ConfigError: a session is open already.
        """
        if self._in_session:
            raise ConfigError("a session is open already, and it serves all that runs until its end. Open one only.")
        self._ranks.check()
        rounds = self._rounds
        self._in_session, rounds.failure = True, None
        try:
            try:
                yield self
            except BaseException as error:
                if rounds.failure is None and self._ranks.in_step:
                    self._tell(error)
                raise
            if rounds.failure is None:
                while rounds.meet(DONE) is not None:
                    pass
                self._traffic = rounds.sent.gather(self._ranks)
        finally:
            self._in_session = False

    def stats(self) -> Traffic:
        """Return the traffic between all ranks up to the end of the last session."""
        return self._traffic

    def outputs(
        self, layer: int, hidden_states: torch.Tensor, top_k_index: torch.Tensor, outputs_dtype: torch.dtype
    ) -> torch.Tensor:
        """Run the experts of one layer on the ranks that hold them.

        Args:
            layer: number among the MoE layers.
            hidden_states: [T, H].
            top_k_index: [T, K]; a number of num_experts or more means none.
            outputs_dtype: of the outputs.

        Returns:
            [T * K, H], the unweighted output of every place, zero where there is no expert.

        Raises:
            ParallelError: another rank failed or was lost.
            ExpertReadError: one of this rank's experts could not be read.
            ConfigError: no session is open.
        """
        with self._lock:
            if not self._in_session:
                raise ConfigError(
                    "the model's experts are spread over several processes, which must know when to answer: run it "
                    "inside `with model.moeflow.parallel.session():`, on all ranks."
                )
            if self._rounds.failure is not None:
                raise ParallelError(self._rounds.failure)
            self._ranks.check()
            assigned = self._tables[layer].assign(top_k_index)
            places = assigned.places.to(hidden_states.device)
            rows = hidden_states[places // top_k_index.shape[1]]
            outputs = hidden_states.new_zeros(top_k_index.numel(), hidden_states.shape[1], dtype=outputs_dtype)
            request = Request(layer, rows, assigned.counts, outputs_dtype, len(hidden_states))
            answered = self._rounds.meet(ASKS, request)
            assert answered is not None, "a rank that asks is not done"
            outputs[places] = answered
            return outputs

    def _tell(self, error: BaseException) -> None:
        """Send this rank's error to the others; their loss does not hide it."""
        try:
            self._rounds.tell(error)
        except ParallelError as lost:
            _log.warning("the other ranks could not be told of a failure here: %s", lost)


def _checked_plan(
    model: "PreTrainedModel", runtime: ExpertRuntime, plan: Plan | str | Path | None, world_size: int
) -> Plan:
    """Return the plan if it fits the model and the ranks."""
    if runtime.predictor is not None:
        raise ConfigError(
            f"the model has a predictor ({runtime.predictor.name!r}), which foresees what this rank's tokens need, and "
            "most of that is on other ranks. Load the model with predictor=None (--predictor none) to spread its "
            "experts."
        )
    num_experts = runtime.experts_per_layer[: len(experts_interface.experts_modules(model))]  # others are of drafts
    if len(set(num_experts)) > 1:
        raise PlacementError(f"the layers have {num_experts} experts, and a plan is for layers with equally many.")
    if plan is None:
        of_layer = np.arange(num_experts[0]) * world_size // num_experts[0]
        return Plan.of_gpus(world_size, np.tile(of_layer, (len(num_experts), 1)))
    if not isinstance(plan, Plan):
        plan = read_plan(plan)
    if (plan.num_layers, plan.num_experts) != (len(num_experts), num_experts[0]):
        raise PlacementError(
            f"the plan is for {plan.num_layers} layers of {plan.num_experts} experts, and the model has "
            f"{len(num_experts)} MoE layers of {num_experts[0]}. Make a plan from a trace of this model."
        )
    if plan.num_gpus != world_size:
        raise PlacementError(
            f"the plan is for {plan.num_gpus} GPUs, and {world_size} ranks run. Start {plan.num_gpus} ranks, or make a "
            f"plan for {world_size} GPUs."
        )
    return plan


def _digest(model: "PreTrainedModel", runtime: ExpertRuntime, plan: Plan) -> str:
    """Hash the data that all ranks must share: the model, the format of its experts, and the plan."""
    digest = hashlib.sha256(f"{model_fingerprint(model)} {model.dtype} {plan}".encode())
    for layer in range(plan.num_layers):
        for record in runtime.records(layer):
            digest.update(repr(record).encode())
    return digest.hexdigest()
