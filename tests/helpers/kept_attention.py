"""One native attention step over kept positions, of random numbers, in any format."""

import numpy as np
import torch

from moeflow.kernels.cpu.step import DONE, StepCode, StepState, instruction_words, tensor_words
from moeflow.step.program import DTYPES, KINDS


class KeptAttention:
    """A step of some sequences.

    Args:
        form: of the records; None for keys and values as they are.
        dtype: of what is computed.
        sizes: query heads, heads of keys, features of keys, features of values.
        lengths: positions that each sequence has before the step.
        sinks: whether there are any.
        options: window, chunk, scale, soft_cap.
    """

    def __init__(self, form, dtype, sizes, lengths, *, sinks=False, **options):
        heads, groups, *widths = sizes
        generator = torch.Generator().manual_seed(sum(sizes) + sum(lengths))

        def random(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        self.form, self.widths, self.lengths = form, widths, lengths
        self.options = {"window": 0, "chunk": 0, "scale": 0.2, "soft_cap": 0.0, **options}
        self.query = random(len(lengths), heads, 1, widths[0])
        self.new = [random(len(lengths), groups, 1, width) for width in widths]
        self.sinks = random(heads) if sinks else None
        self.olds = [[random(groups, count, width) for width in widths] for count in lengths]
        self.room()

    def room(self):
        """Put what is kept into memory with room for three more positions."""
        self.memory = []
        for olds in self.olds:
            kept = olds if self.form is None else [one.encode(old) for one, old in zip(self.sides, olds, strict=True)]
            self.memory.append([torch.cat([one, one.new_zeros(len(one), 3, one.shape[2])], 1) for one in kept])

    def run(self, num_threads=1):
        """Attend; returns [rows, 1, heads, features of values]."""
        rows = len(self.lengths)
        out = self.query.new_empty(rows, 1, self.query.shape[1], self.widths[1])
        tensors = [out, self.query, *self.new, *([] if self.sinks is None else [self.sinks])]
        words = [tensor_words(t.data_ptr(), DTYPES.index(t.dtype), tuple(t.shape), t.stride()) for t in tensors]
        whole, real = (
            [0, self.options["window"], self.options["chunk"]],
            [self.options[x] for x in ("scale", "soft_cap")],
        )
        code = StepCode([instruction_words(KINDS.index("attend"), whole, real, words)])
        kept = np.array([[keys.data_ptr(), values.data_ptr(), keys.shape[1]] for keys, values in self.memory], np.int64)
        lengths, firsts, is_done = np.array(self.lengths, np.int64), np.zeros(rows, np.int64), np.zeros(1, np.int64)
        state = StepState(
            kept=kept.ctypes.data, lengths=lengths.ctypes.data, firsts=firsts.ctypes.data, num_rows=rows, num_live=rows,
            num_threads=num_threads, is_done=is_done.ctypes.data, kept_format=self.form.number if self.form else 0,
        )  # fmt: skip
        assert code.run(0, state) == DONE
        return out

    def decoded(self):
        """The same step in float32, of what the records stand for, which are kept as they are."""
        twin = KeptAttention.__new__(KeptAttention)
        vars(twin).update(vars(self), form=None, query=self.query.float())
        twin.sinks = None if self.sinks is None else self.sinks.float()
        twin.new = [*map(decoded, self.sides, self.new)]
        twin.olds = [[*map(decoded, self.sides, olds)] for olds in self.olds]
        twin.room()
        return twin

    @property
    def sides(self):
        """The formats of keys and of values."""
        return self.form.key, self.form.value


def decoded(form, tensor):
    """What a tensor's records stand for, in float32."""
    return form.decode(form.encode(tensor), tensor.shape[-1], torch.float32)
