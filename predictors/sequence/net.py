"""Network of the sequence predictor: a recurrent network beside weighed evidence, then refinement and rollout on top.

Torch trains it. SequencePredictor runs the same arithmetic step by step in numpy.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from moeflow.predictors.odds import log_odds
from moeflow.predictors.sequence.inputs import NUM_CONTEXT, NUM_EVIDENCE, SequenceInputs

_INITIAL_WEIGHTS = (1.0, 1.0, 0.3, 0.3, 0.3, 0.3, 0.3, 0.5)  # of the evidence, before training
_MAX_REFINE_ENTRIES = 16_000_000
NUM_LATER_EVIDENCE = 4  # the coming step's logits, two of recent use, the continuation of the repeat


@dataclass(frozen=True)
class SequenceShape:
    """Sizes of the sequence model.

    Args:
        num_layers: L.
        num_experts: E.
        num_known_tokens: V, tokens with a row of their own.
        width: of the recurrent state.
        token_width: of a token's embedding.
        reach: D, layers ahead that a layer's routes refine.
        memory: R, layers whose routes refine one.
        num_later: steps after the coming one that are predicted.
        later_rank: width of the recurrent state's part in them.
    """

    num_layers: int
    num_experts: int
    num_known_tokens: int
    width: int = 256
    token_width: int = 64
    reach: int = 3
    memory: int = 4
    num_later: int = 8
    later_rank: int = 64

    def within_limits(self) -> "SequenceShape":
        """Return these sizes with reach and memory cut down until the refinement of a large model is affordable."""
        reach, memory = min(self.reach, self.num_layers - 1), min(self.memory, self.num_layers)
        entries = self.num_layers * self.num_experts**2
        while reach > 1 and memory > 1 and entries * reach * memory > _MAX_REFINE_ENTRIES:
            reach, memory = reach - 1, memory - 1
        return SequenceShape(**{**vars(self), "reach": reach, "memory": memory})


class SequenceNet(nn.Module):
    """Predicts every layer's experts of a step from the steps before it and the token just fed.

    Args:
        shape: sizes.
        popularity: [L, E], initial biases as probabilities.
        dropout: of inputs and state while training.
    """

    def __init__(self, shape: SequenceShape, popularity: np.ndarray, dropout: float = 0.25) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        flat = shape.num_layers * shape.num_experts
        self.embedding = nn.Embedding(shape.num_known_tokens + 1, shape.token_width)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.inward = nn.Linear(flat + 2 * shape.token_width, shape.width)
        self.recurrent = nn.GRU(shape.width, shape.width, batch_first=True)
        self.outward = nn.Linear(shape.width + 2 * shape.token_width, flat, bias=False)
        nn.init.zeros_(self.outward.weight)
        self.bias = nn.Parameter(torch.from_numpy(log_odds(popularity).astype(np.float32)).flatten())
        self.trust = nn.Linear(NUM_CONTEXT + shape.width, NUM_EVIDENCE * shape.num_layers)
        nn.init.zeros_(self.trust.weight)
        with torch.no_grad():
            self.trust.bias.copy_(torch.tensor(_INITIAL_WEIGHTS).repeat_interleave(shape.num_layers))
        columns = shape.memory * shape.reach * shape.num_experts
        self.refine = nn.Parameter(torch.zeros(shape.num_layers, shape.num_experts, columns))
        later_flat = shape.num_later * shape.later_rank
        self.later_in = nn.Linear(shape.width, later_flat)
        self.later_out = nn.Linear(shape.later_rank, flat, bias=False)
        nn.init.zeros_(self.later_out.weight)
        self.later_trust = nn.Linear(NUM_CONTEXT, shape.num_later * NUM_LATER_EVIDENCE * shape.num_layers)
        nn.init.zeros_(self.later_trust.weight)
        nn.init.constant_(self.later_trust.bias, 0.3)

    def forward(
        self, inputs: SequenceInputs, state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predict padded sequences.

        Args:
            inputs: of B sequences, [B, T, ...].
            state: [1, B, width], from the steps before these; zeros when None.

        Returns:
            Logits [B, T, L, E]; the recurrent states [B, T, width]; the last state.
        """
        shape = self.shape
        lead = inputs.token_rows.shape
        rows = inputs.token_rows
        if self.training:  # teaches the row of unknown tokens
            rows = torch.where(torch.rand(lead, device=rows.device) < 0.1, 0, rows)
        tokens = torch.cat([self.embedding(rows), self.embedding(inputs.previous_rows)], -1)
        tokens = F.dropout(tokens, self.dropout, self.training)
        previous = F.dropout(inputs.previous, self.dropout, self.training)
        inward = torch.relu(self.inward(torch.cat([previous, tokens], -1)))
        states, state = self.recurrent(F.dropout(inward, self.dropout, self.training), state)
        kept = F.dropout(states, self.dropout, self.training)
        trust = self.trust(torch.cat([inputs.context, kept], -1)).view(*lead, NUM_EVIDENCE, shape.num_layers)
        evidence = inputs.evidence.view(*lead, NUM_EVIDENCE, shape.num_layers, shape.num_experts)
        logits = self.outward(torch.cat([kept, tokens], -1)) + self.bias
        logits = logits.view(*lead, shape.num_layers, shape.num_experts)
        return logits + torch.einsum("btfle,btfl->btle", evidence, trust), states, state

    def refined(self, logits: torch.Tensor, routes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Refine logits by the layers observed before each.

        Args:
            logits: [N, L, E], as predicted before the step.
            routes: [N, L, E], the truth.

        Returns:
            Logits [N, L - 1, D, E] of layer a + 1 + d given the layers up to a, and [L - 1, D] whether there is such a
            layer.
        """
        shape = self.shape
        surprise = routes - torch.sigmoid(logits)
        told = torch.einsum("nle,lef->nlf", surprise, self.refine)
        told = told.view(-1, shape.num_layers, shape.memory, shape.reach, shape.num_experts)
        anchors = shape.num_layers - 1
        heard = told[:, :anchors, 0].clone()
        for back in range(1, min(shape.memory, anchors)):
            heard[:, back:] += told[:, : anchors - back, back]
        target = torch.arange(anchors)[:, None] + 1 + torch.arange(shape.reach)
        return logits[:, target.clamp(max=anchors)] + heard, target <= anchors

    def later(
        self, inputs: SequenceInputs, logits: torch.Tensor, states: torch.Tensor, at: torch.Tensor
    ) -> torch.Tensor:
        """Predict the steps after the coming one, for some positions of one sequence.

        Args:
            inputs: of one sequence.
            logits: [T, L, E], of the coming steps.
            states: [T, width].
            at: [N], the positions asked.

        Returns:
            Logits [N, num_later, L, E].
        """
        shape = self.shape
        ahead = torch.arange(1, shape.num_later + 1, device=at.device)
        source = inputs.repeats[at]
        period = (at - source).clamp_min(1)
        copied = inputs.routes[source.clamp_min(0)[:, None] + ahead % period[:, None]] * (source >= 0)[:, None, None]
        copied = copied.view(len(at), shape.num_later, shape.num_layers, shape.num_experts)
        known = torch.cat(
            [
                (logits[at].flatten(1) - self.bias)[:, None],
                inputs.evidence[at, 2:4],
            ],
            1,
        ).view(len(at), NUM_LATER_EVIDENCE - 1, shape.num_layers, shape.num_experts)
        trust = self.later_trust(inputs.context[at])
        trust = trust.view(len(at), shape.num_later, NUM_LATER_EVIDENCE, shape.num_layers)
        ranks = torch.tanh(self.later_in(states[at])).view(len(at), shape.num_later, shape.later_rank)
        base = (self.later_out(ranks) + self.bias).view_as(copied)
        weighed = torch.einsum("nhfl,nfle->nhle", trust[:, :, :-1], known)
        return base + weighed + trust[:, :, -1, :, None] * copied
