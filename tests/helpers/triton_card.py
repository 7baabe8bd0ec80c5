"""A card that is not here: Triton is asked for kernels as on that card, and says what it would compile and how.

Kernels get CPU tensors, in a process without the interpreter; nothing is launched. Triton itself makes the keys of its
compiled kernels, from arguments, their alignment and its rules, so what is counted is what a card would compile.
"""

import re
import subprocess
from types import SimpleNamespace
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

# What one program may have of shared memory, bytes (CUDA C++ Programming Guide, technical specifications).
SHARED_BYTES = {86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}


class Kernel(NamedTuple):
    """One kernel that Triton was asked for."""

    function: Any
    signature: dict
    constants: dict
    attributes: dict
    options: dict

    @property
    def name(self) -> str:
        return self.function.fn.__name__.lstrip("_")

    def describe(self) -> str:
        """Name the kernel by its inputs, tile and warps."""
        tile = " x ".join(
            str(self.constants[(self.function.arg_names.index(name),)])
            for name in ("BLOCK_TOKENS", "BLOCK_ROWS", "BLOCKS", "BLOCK")
            if name in self.function.arg_names
        )
        return f"{self.name} {self.signature.get('inputs', '')} {tile}, {self.options['num_warps']} warps"


class Compiled(NamedTuple):
    """What the compiler says of a kernel; local bytes are those that do not fit into registers."""

    registers: int
    local_bytes: int
    shared_bytes: int
    ptx: str
    ttgir: str

    @property
    def is_on_tensor_cores(self) -> bool:
        return "wgmma" in self.ptx or "mma.sync" in self.ptx

    @property
    def sums(self) -> list[str]:
        """How each sum's values lie in threads, which is the order in which they are added."""
        layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", self.ttgir, re.MULTILINE))
        found = re.findall(r'"tt\.reduce".*?\}\) : \((tensor<[^)]*)\)', self.ttgir, re.DOTALL)
        return [re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), one) for one in found]


class Card:
    """Takes launches instead of a card of `arch`, such as 86. `with Card(86) as card:`, then `card.kernels`."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.target = GPUTarget("cuda", arch, 32)
        self.kernels: dict[str, Kernel] = {}  # by Triton's own key

    def __enter__(self) -> "Card":
        driver.set_active(
            SimpleNamespace(
                get_current_device=lambda: self.arch,  # Triton keeps a cache for each device
                get_current_stream=lambda _: 0,
                get_current_target=lambda: self.target,
            )
        )
        knobs.runtime.jit_cache_hook = self._take
        return self

    def __exit__(self, *_: object) -> None:
        knobs.runtime.jit_cache_hook = None
        driver._active = None

    def _take(self, *, key, fn, compile, **_) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion")}
        self.kernels[f"{fn.name} {key}"] = Kernel(
            fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0], options
        )
        return True  # as if it were compiled already

    def compile(self, kernel: Kernel) -> Compiled:
        source = ASTSource(kernel.function, kernel.signature, kernel.constants, kernel.attributes)
        made = triton.compile(source, target=self.target, options=kernel.options)
        path = next(path for name, path in made.metadata_group.items() if name.endswith(".cubin"))
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
        return Compiled(int(registers), int(stack), made.metadata.shared, made.asm["ptx"], made.asm["ttgir"])
