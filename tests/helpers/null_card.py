"""A card that takes every launch and runs nothing: Triton compiles for it, and each launch is written down.

For processes without the interpreter. Run as a script: compares the launches that `kernels/triton/launch.py` makes with
Triton's own, and prints how many kernels and launches there were.
"""

import itertools
import random
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from helpers.triton_compile import DTYPES, TOP_K, WIDTH, all_models
from moeflow.kernels.triton import launch


class NullCard:
    """Takes launches in place of a card of compute capability 8.9.

    Attributes:
        launches: (grid, compiled kernel, arguments) of each.
    """

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        card, numbers = self, itertools.count(1)

        class Launcher:
            def __init__(self, source, metadata):
                pass

            def __call__(self, x, y, z, stream, function, *rest):
                card.launches.append(((x, y, z), function, rest[4:]))

        driver.set_active(
            SimpleNamespace(
                get_current_device=lambda: 0,
                get_current_stream=lambda _: 0,
                get_current_target=lambda: GPUTarget("cuda", 89, 32),
                launcher_cls=Launcher,
                utils=SimpleNamespace(
                    load_binary=lambda *_: (1, next(numbers), 32, 0, 1024),
                    get_device_properties=lambda _: {"max_shared_mem": 101_376, "max_num_regs": 65_536, "warpSize": 32},
                ),
            )
        )


def plain(value):
    return (value.data_ptr(), value.dtype) if isinstance(value, torch.Tensor) else value


def calls(draw, experts, dtype):
    """Make one decode call of a model, of any number of tokens, at any address."""
    tokens, skip = draw.randint(1, 16), draw.randint(0, 3)
    x = torch.zeros(tokens * WIDTH + skip, dtype=dtype)[skip:].view(tokens, WIDTH)
    weights = torch.zeros(tokens * TOP_K + skip, dtype=draw.choice((dtype, torch.float32)))[skip:].view(tokens, TOP_K)
    arena = torch.zeros(2, -(-experts.plan.record_bytes // 64) * 64 + draw.choice((0, 64)), dtype=torch.uint8)
    row = torch.zeros(128 + skip, dtype=torch.int32)[skip:]
    index = torch.zeros(tokens, TOP_K, dtype=draw.choice((torch.int64, torch.int32)))
    missed, layer = torch.zeros(48, dtype=torch.int32), draw.choice((0, 1, 16, 47))
    slots = torch.zeros(tokens, TOP_K, dtype=torch.int32)
    return draw.choice(
        (
            lambda: experts.lookup(x, arena, index, row, missed, layer, weights),
            lambda: experts.decode(x, arena, slots, weights),
            lambda: experts.pairs(x, arena, torch.zeros(3, dtype=torch.int32), slots.view(-1)[:3].clone()),
        )
    )


def main() -> None:
    card, draw, kept = NullCard(), random.Random(0), 0
    models = [(model.experts(), dtype) for model in all_models()[:4] for dtype in DTYPES]
    for _ in range(300):
        call = calls(draw, *draw.choice(models))
        found = []
        for is_own in (False, True):  # by what is kept, then by Triton
            before = dict(launch._COMPILED)
            if is_own:
                launch._COMPILED.clear()
            card.launches.clear()
            call()
            # Results have other addresses in the second call.
            found.append([(grid, function, [plain(one)[1:] if isinstance(one, torch.Tensor) else one for one in rest])
                          for grid, function, rest in card.launches])  # fmt: skip
            if is_own:
                launch._COMPILED.update(before)
            else:
                kept += len(before)
        assert found[0] == found[1], found
    print(len(launch._COMPILED), "kept;", "launches agree")
    assert kept


if __name__ == "__main__":
    main()
