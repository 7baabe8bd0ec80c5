"""Options of load_moe, checked once. Their fields are the source of the command line's flags and of the docs' table.

Knows what is allowed. Knows nothing of models; torch is imported only where a device or a format is checked, because
the command line reads this module for its help text.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeflow.errors import ConfigError
from moeflow.machine.gpus import check_gpu
from moeflow.memory_size import MemorySize, parse_bytes, parse_kv_memory, parse_memory
from moeflow.policy.key_value_policies import kv_policy_options

if TYPE_CHECKING:
    import torch

    from moeflow.fit.plan import Plan

_MEMORY_FLAG = 'bytes, "6GiB", "600MB", "25%" of all experts, or "auto"'


def _about(
    meaning: str, *, flag: str | None = None, metavar: str | None = None, choices: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the metadata of one option.

    Args:
        meaning: for the documentation.
        flag: help text of its flag; None where the command line has none.
        metavar: of the flag's value.
        choices: every allowed value; empty where other rules decide.
    """
    return {"meaning": meaning, "flag": flag, "metavar": metavar, "choices": choices}


@dataclass(frozen=True)
class LoadOptions:
    """How load_moe loads a model; each field's metadata says what it means.

    Raises:
        ConfigError: an option is malformed, unknown or does not fit the machine.
    """

    device: "str | torch.device" = field(
        default="auto",
        metadata=_about(
            '"auto" (the GPU if there is one), "cpu", "cuda" or "cuda:N".',
            flag='"auto", "cpu", "cuda" or "cuda:N"',
        ),
    )
    dtype: "str | torch.dtype" = field(
        default="auto",
        metadata=_about(
            '"auto" (the checkpoint\'s), or a torch dtype or its name.',
            flag='"auto", "float32", "bfloat16", "float16" or "float64"',
        ),
    )
    memory: MemorySize = field(
        default="auto",
        metadata=_about(
            'bytes of experts and of engines\' keys and values together: a number, "12GiB", or "auto" (each has a '
            "budget of its own). Experts take what keys and values leave: they leave before a conversation needs the "
            "room, and come back when it is dropped. In place of `expert_memory` and `kv_memory`; on the CPU alone.",
            flag='experts, keys and values together: bytes, "12GiB", or "auto"; CPU only',
            metavar="SIZE",
        ),
    )
    expert_memory: MemorySize = field(
        default="auto",
        metadata=_about(
            'bytes the experts may take on the device: a number, "6GiB", "600MB", "25%" of all experts, or '
            '"auto". On the CPU "auto" starts low and then follows what is free inside the process\'s own memory '
            "limit, so that the process is not paged out; on a GPU it takes what is free after the rest of the "
            "model.",
            flag=_MEMORY_FLAG,
            metavar="SIZE",
        ),
    )
    host_memory: MemorySize = field(
        default="auto",
        metadata=_about(
            "bytes of pinned host memory between disk and GPU, written the same way; CUDA only.",
            flag=f"pinned, CUDA only: {_MEMORY_FLAG}",
            metavar="SIZE",
        ),
    )
    kv_memory: MemorySize = field(
        default="auto",
        metadata=_about(
            'bytes that expert_memory="auto" leaves to keys and values: a number, "2GiB", or "auto" (2048 positions on '
            "the CPU, 4096 on a GPU). Room for activations on a GPU is measured by a pass over as many positions, and "
            'Engine(kv_memory="auto") takes as many bytes.',
        ),
    )
    quantization: str | None = field(
        default=None,
        metadata=_about(
            'a weight format the experts are rounded to as they are read: "int8", "int4", "int3", "int2", "int1", '
            'or with a group size, "int4-g32". Lossy. Every read still takes the unquantised bytes from the disk: '
            "where not all experts fit, write them once with `moeflow quantize`, and load that folder. Or "
            '"lossless": bfloat16 experts take about three quarters of their bytes, and every bit stays; '
            "`moeflow pack` writes them so once, and such a folder needs no option.",
            flag='round experts as they are read: int8, int4 ...; lossy, but for "lossless"',
            metavar="F",
        ),
    )
    policy: str = field(
        default="auto",
        metadata=_about(
            'which expert leaves when a slot is needed: "lru", "lfu", "lfru" (frequency / (age + 1)), "static", '
            '"forecast" (the one whose slot is worth the least by prediction), or "auto" ("forecast" where there '
            'is a predictor, else "lfru").',
            flag="eviction: lru, lfu, lfru, static, forecast or auto",
            choices=("auto", "lru", "lfu", "lfru", "static", "forecast"),
        ),
    )
    predictor: str | Path | None = field(
        default="auto",
        metadata=_about(
            'what predicts the experts needed next, so that they are fetched in time: "auto" (the coming layers\' '
            'own routers, asked early), "lookahead", "markov", "popularity", "ensemble", a file written by '
            "`moeflow predictor train`, or None. It never changes a bit of the output, and switches itself off "
            "where it does not pay.",
            flag='predicts what to prefetch: "auto", a name, a file, or "none"',
            metavar="P",
        ),
    )
    miss: str = field(
        default="copy",
        metadata=_about(
            'what becomes of an expert that is not on the GPU: "copy" (it comes to the GPU), or "cheapest" (of '
            "the experts that a layer misses and that lie in host memory, the CPU computes some in place while "
            'others are copied, split by bandwidths measured while both run). "cheapest" is for CUDA only, and '
            "lossy: the CPU's last bits differ from the GPU's, so that the output depends on timing. It is not "
            "yet measured on a GPU.",
            flag='"copy", or "cheapest": on a GPU, the CPU may compute experts in host memory; lossy',
            choices=("copy", "cheapest"),
        ),
    )
    prune: float = field(
        default=0.0,
        metadata=_about(
            "share of the experts behind each token's first that are left out, those the router hardly wants, by "
            "thresholds found on calibration text while loading (0.5 skips half of them). Lossy, so 0 by default.",
            flag="leave out this share of experts behind the first; lossy",
            metavar="SHARE",
        ),
    )
    step: str = field(
        default="auto",
        metadata=_about(
            'what runs the decode steps of one sequence in generate(): "auto" (on the CPU, a program captured from the '
            "model at its first step, which takes several seconds once a model, kept on disk, and run natively from "
            'one missing expert to the next; steps that it cannot run stay the model\'s own), or "python" (the '
            "model's own code). Last bits differ between the two.",
            flag='decode steps: "auto" (captured once a model, then run natively), or "python"',
            choices=("auto", "python"),
        ),
    )
    cuda_graphs: bool = field(
        default=False,
        metadata=_about(
            "capture the decode steps of generate() as CUDA graphs, once a generation, and replay them: whole while no "
            "expert is missed, else in pieces between the layers' experts. Keys and values stay where they are, with "
            "room for up to twice the positions, so that last bits differ from those without; they are the same at "
            "every budget. CUDA only; not yet measured on a GPU.",
            flag="replay decode steps as CUDA graphs, in pieces where experts are missed; CUDA only",
        ),
    )
    plan: "str | Path | Plan | None" = field(
        default=None,
        metadata=_about(
            "a plan of `moeflow.fit`, or the file that `moeflow fit -o` wrote: how much every part of the process may "
            "take. A plan of another model or machine, or one that was changed, is refused, and so is what goes over "
            "one of its lines, by the line's name. It stands in place of `device`, `expert_memory` and `kv_memory`.",
            flag="a plan that moeflow fit -o wrote, in place of sizes of memory",
            metavar="FILE",
        ),
    )
    integrity: str = field(
        default="off",
        metadata=_about(
            '"sample": after some of the copies of experts (one of 32, drawn with a seed, and at most 4 MB a second) '
            "the slot is compared with its source by checksum, in a thread of its own. What differs is named in a "
            'warning and counted in stats()["integrity"]. The output stays the same.',
            flag='"sample" compares some experts in memory with the disk, and warns of what differs; off',
            choices=("off", "sample"),
        ),
    )
    speculation: "str | Mapping[str, Any] | None" = field(
        default="auto",
        metadata=_about(
            'drafts in engines on this model (chat, serve, batch): "auto" (steps also compute tokens that may come '
            "next, where that pays by the clock; so do greedy calls of generate(prompt_lookup_num_tokens=)), "
            '"off" or None, or a dict of an engine\'s options. The tokens of answers are the same.',
            flag='"auto": steps also compute tokens that may come next, where that pays; "off"',
        ),
    )
    kv_format: str = field(
        default="auto",
        metadata=_about(
            'in which engines on this model keep keys and values: "auto" (the model\'s dtype), "int8" (a little more '
            'than half of bfloat16\'s bytes), or "int4" (values in int4, keys in int8: two fifths). Both are lossy.',
            flag="engines keep keys and values in int8, or values in int4 as well: fewer bytes, lossy (auto)",
            choices=("auto", "int8", "int4"),
        ),
    )
    kv_policy: "str | Mapping[str, Any] | None" = field(
        default=None,
        metadata=_about(
            'what engines see of long texts: None (all), "sinks", "heavy_hitters", "pages" (docs/kv_policies.md), '
            'or a dict of a name and its sizes, also written "sinks:sinks=4,window=1024". Lossy.',
            flag='long texts, lossy: "sinks", "heavy_hitters", "pages", or with sizes, "sinks:window=1024"',
        ),
    )
    trace: str | Path | None = field(
        default=None,
        metadata=_about("a file to record into which experts every token is routed to; appended to where it exists."),
    )

    def __post_init__(self) -> None:
        on_cpu = self.torch_device.type == "cpu"
        for option in fields(self):
            choices, value = option.metadata["choices"], getattr(self, option.name)
            if choices and value not in choices:
                raise ConfigError(f"{option.name}={value!r} is unknown. Allowed: {', '.join(choices)}.")
        if isinstance(self.prune, bool) or not isinstance(self.prune, (int, float)) or not 0 <= self.prune <= 1:
            raise ConfigError(f"prune={self.prune!r} is not a share. Give 0 (leave out nothing) to 1.")
        if not isinstance(self.cuda_graphs, bool):
            raise ConfigError(f"cuda_graphs={self.cuda_graphs!r:.80} is neither True nor False.")
        if self.cuda_graphs and on_cpu:
            raise ConfigError(
                "cuda_graphs=True captures what a GPU is told to do, and this model runs on the CPU. Leave it False."
            )
        if self.cuda_graphs and self.integrity != "off":
            raise ConfigError(
                f"integrity={self.integrity!r} copies from the GPU at any time, and cuda_graphs=True cannot capture "
                "beside that. Leave one of them out."
            )
        if self.miss != "copy" and on_cpu:
            raise ConfigError(
                f"miss={self.miss!r} chooses between copying an expert to the GPU and computing it in host memory, and "
                'this model runs on the CPU, where both are one. Leave miss="copy".'
            )
        if self.host_memory != "auto" and on_cpu:
            raise ConfigError(
                f"host_memory={self.host_memory!r} is the tier between the disk and a GPU, and this model runs on the "
                "CPU. Put the memory into expert_memory."
            )
        if not isinstance(self.speculation, (Mapping, type(None))) and self.speculation not in ("auto", "off"):
            raise ConfigError(
                f'speculation={self.speculation!r:.80} is unknown. Allowed: "auto", "off", None, or a dict of options.'
            )
        kv_policy_options(self.kv_policy)
        for name, value in (("expert_memory", self.expert_memory), ("host_memory", self.host_memory)):
            if value != "auto":
                parse_memory(value, name=name, whole_bytes=0)
        if self.kv_memory != "auto":
            parse_kv_memory(self.kv_memory)
        if self.memory != "auto":
            self._check_shared(on_cpu)
        for name, value in (("predictor", self.predictor), ("trace", self.trace)):
            if value is not None and (not isinstance(value, (str, Path)) or value == ""):
                raise ConfigError(f"{name} is {value!r:.80}; it must be a name, the path of a file, or None.")
        if not isinstance(self.quantization, (str, type(None))):
            raise ConfigError(f'quantization is {self.quantization!r:.80}; it must be a name such as "int4", or None.')
        _ = self.weight_format, self.torch_dtype  # refuse unknown ones

    def _check_shared(self, on_cpu: bool) -> None:
        """Refuse what does not go with one budget of experts and keys and values."""
        parse_bytes(self.memory, name="memory")
        for name in ("expert_memory", "kv_memory"):
            if getattr(self, name) != "auto" and self.plan is None:
                raise ConfigError(
                    f"memory={self.memory!r} divides itself between experts and keys and values, and "
                    f"{name}={getattr(self, name)!r} fixes one of them. Drop {name}, or drop memory and give both."
                )
        if self.plan is not None:
            raise ConfigError(
                f"memory={self.memory!r} was given beside a plan, which says how much every part takes. Drop one of "
                "them."
            )
        if not on_cpu:
            raise ConfigError(
                f"memory={self.memory!r} moves bytes between experts and keys and values in host memory, and this "
                "model is on a GPU, where experts give back whole segments. Drop it, and give expert_memory and "
                "kv_memory."
            )

    @cached_property
    def torch_device(self) -> "torch.device":
        """The device that `device` means on this machine."""
        import torch

        if isinstance(self.device, str) and self.device == "auto":
            return (
                torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
            )
        allowed = 'Allowed: "auto", "cpu", "cuda", "cuda:N".'
        try:
            device = torch.device(self.device)
        except (RuntimeError, TypeError, ValueError, OverflowError):
            raise ConfigError(f"device={self.device!r} is unknown. {allowed}") from None
        if device.type == "cuda":
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            index = device.index
            if index is None:
                index = torch.cuda.current_device() if count else 0
            check_gpu(str(self.device), index, count)
            return torch.device("cuda", index)
        if device.type != "cpu":
            raise ConfigError(f"device={str(device)!r} is not supported. {allowed}")
        return torch.device("cpu")  # "cpu:0" is the same, and tensors there say "cpu"

    @cached_property
    def torch_dtype(self) -> "str | torch.dtype | dict[str, torch.dtype] | None":
        """The dtype that `dtype` names; "auto" and None as they are, and a dict of transformers' with its values so."""
        from moeflow.dtypes import parse_dtype

        if self.dtype is None or (isinstance(self.dtype, str) and self.dtype == "auto"):
            return self.dtype
        if isinstance(self.dtype, dict):
            return {part: parse_dtype(value, f"dtype[{part!r}]") for part, value in self.dtype.items()}
        return parse_dtype(self.dtype, "dtype")

    @property
    def is_lossless(self) -> bool:
        """Whether experts are stored without loss as they are read."""
        return self.quantization == "lossless"

    @cached_property
    def weight_format(self) -> str | None:
        """The full name of the format in `quantization`, None where experts keep their bits."""
        if self.quantization is None or self.is_lossless:
            return None
        from moeflow.checkpoint.quantized_source import writable_format

        try:
            return writable_format(self.quantization).name
        except ConfigError as error:
            raise ConfigError(f'{error} Or "lossless", for experts in bfloat16.') from None


def flag_options() -> list[Field]:
    """Return the options that are flags of the command line, in the order of the fields."""
    return [option for option in fields(LoadOptions) if option.metadata["flag"] is not None]
