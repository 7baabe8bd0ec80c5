"""What widths chosen per expert are worth: perplexity at equal bytes, against uniform widths and simpler choices.

    python scripts/eval_mixed.py MODEL --text wikitext2/valid.txt [--calibration books_train.txt.xz]
        [--average-bits 2.5,3] [--method hqq] [--windows 16] [--window-tokens 512] [--statistics FILE] [--save FOLDER]

The model runs in float32 with its experts rounded to the formats, so figures depend on no kernel.
Perplexity: windows evenly spread over the text, every token but a window's first predicted from those before it.
Choices between two uniform widths are held against the straight line and the geometric mean of the two perplexities.
`--save` writes formats as JSON, [layers][experts]. Calibrate on other text than is judged.
"""

import argparse
import json
import lzma
import math
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeflow.calibration.expert_statistics import ExpertStatistics
from moeflow.calibration.sensitivity import measure_experts
from moeflow.calibration.windows import cut_windows, varied_windows
from moeflow.convert.bit_allocation import allocate
from moeflow.convert.mixed_precision import WIDTHS, allocate_formats, default_widths
from moeflow.hf import experts_interface
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import find_format
from moeflow.kernels.quantization.quantize import quantize


def read_text(file: str) -> str:
    """Read a text file, xz or plain."""
    opener = lzma.open if file.endswith(".xz") else open
    with opener(file, "rt", encoding="utf-8") as stream:
        return stream.read()


def text_windows(tokenizer, text: str, num_windows: int, length: int) -> torch.Tensor:
    """Return [num_windows, length] token ids, evenly spread."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    starts = [(len(ids) - length) * i // max(num_windows - 1, 1) for i in range(num_windows)]
    return torch.tensor([ids[start : start + length] for start in starts])


@torch.inference_mode()
def log_likelihood(model, windows: torch.Tensor) -> np.ndarray:
    """Return [num_windows] mean negative log-likelihood a token."""
    found = []
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        found.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    return np.array(found)


class Rounded:
    """A model whose experts can be put into any formats and back."""

    def __init__(self, model, method: str):
        self.model, self.method = model, method
        self.modules = [module for _, module in experts_interface.experts_modules(model)]
        self.exact = [{n: p.detach().clone() for n, p in m._parameters.items()} for m in self.modules]
        self._stored: dict[tuple, dict] = {}  # quantised once for all choices

    @torch.no_grad()
    def put(self, formats: list[list[str]] | None) -> None:
        """Round every expert to its format; None restores all."""
        for layer, (module, exact) in enumerate(zip(self.modules, self.exact, strict=True)):
            for name, values in exact.items():
                for expert, value in enumerate(values):
                    if formats is not None and value.dim() == 2:
                        value = self._round(value, (layer, expert, name, formats[layer][expert]), module.is_transposed)
                    module._parameters[name][expert] = value

    def _round(self, value, key, transposed):
        matrix, spec, name = (value.T if transposed else value), find_format(key[3]), key[2]
        if key not in self._stored:
            self._stored[key] = quantize(matrix, spec, method=self.method, name=name)
        found = dequantize(self._stored[key], name, spec, tuple(matrix.shape))
        return found.T if transposed else found


def other_choices(statistics: ExpertStatistics, average_bits: float) -> dict[str, list[list[str]]]:
    """Return simpler choices at the same bytes: each layer for itself, and all layers taken as equally sensitive."""
    sizes, widths = statistics.expert_bytes(), [find_format(name).bits for name in statistics.formats]
    names = np.array(statistics.formats)
    rows = []
    for layer in range(len(sizes)):
        budget = int(sum(np.interp(average_bits, widths, row) for row in sizes[layer]))
        found = allocate(statistics.costs()[layer : layer + 1], sizes[layer : layer + 1], budget)
        rows.append(names[found.choice[0]][: statistics.num_experts[layer]].tolist())
    equal = statistics._replace(divergence=statistics.disturbance)
    return {"each layer alone": rows, "all layers, equally sensitive": allocate_formats(equal, average_bits).formats}


def main(argv=None) -> None:
    """Print the table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", help="text file, plain or xz; without it, as moeflow quantize")
    parser.add_argument("--statistics", help="npz file: read where it exists, else written")
    parser.add_argument("--average-bits", default="2.5,3")
    parser.add_argument("--method", default="hqq")
    parser.add_argument("--calibration-tokens", type=int, default=6144)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window-tokens", type=int, default=512)
    parser.add_argument("--simpler", action="store_true", help="also simpler choices at the same bytes")
    parser.add_argument("--save", help="folder for the chosen formats as JSON")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = text_windows(tokenizer, read_text(arguments.text), arguments.windows, arguments.window_tokens)

    begin = time.perf_counter()
    averages = [float(bits) for bits in arguments.average_bits.split(",")]
    if arguments.statistics and Path(arguments.statistics).exists():
        statistics = ExpertStatistics.load(arguments.statistics)
    else:
        if arguments.calibration:
            cut = cut_windows(tokenizer, read_text(arguments.calibration), arguments.calibration_tokens)
        else:
            cut = varied_windows(model, tokenizer, arguments.calibration_tokens)
        formats = [f"int{bits}-g64" for bits in default_widths(min(averages))]
        statistics = measure_experts(model, cut, formats, method=arguments.method)
        if arguments.statistics:
            statistics.save(arguments.statistics)
    print(f"statistics of {statistics.num_tokens:,} tokens: {time.perf_counter() - begin:.0f} s", flush=True)

    rounded, rows = Rounded(model, arguments.method), {}
    weights = sum(values[0].numel() for values in rounded.exact[0].values())  # of one expert
    ends = sorted({end for bits in averages for end in _ends(bits)})
    choices = {"float32": (None, None)}
    for bits in ends:
        choices[f"uniform {bits}"] = ([[f"int{bits}-g64"] * n for n in statistics.num_experts], None)
    for bits in averages:
        found = allocate_formats(statistics, bits)
        a = found.allocation
        print(f"{bits} bits: cost {a.cost:.4g}, bound {a.bound:.4g}, gap {100 * a.gap:.3f} %, {a.seconds:.2f} s")
        choices[f"mixed {bits}"] = (found.formats, bits)
        if arguments.save:
            Path(arguments.save).mkdir(parents=True, exist_ok=True)
            Path(arguments.save, f"mixed-{bits}.json").write_text(json.dumps(found.formats))
    for bits in averages if arguments.simpler else ():
        for name, formats in other_choices(statistics, bits).items():
            choices[f"{bits}, {name}"] = (formats, bits)

    print(
        "\n| experts | bits a weight, all included | widths 1, 2, 3, 4, 8 | perplexity | ± of the ratio to uniform, % |"
    )
    print("|---|---|---|---|---|")
    sizes = dict(zip(statistics.formats, statistics.num_bytes[0].tolist(), strict=True))
    losses = {}
    for name, (formats, bits) in choices.items():
        rounded.put(formats)
        losses[name] = log_likelihood(model, windows)
        flat = [form for row in formats or [] for form in row]
        taken = 8 * sum(sizes[form] for form in flat) / len(flat) / weights if flat else 32
        shares = ", ".join(str(sum(find_format(f).bits == b for f in flat)) for b in WIDTHS) if flat else ""
        against = losses.get(f"uniform {_ends(bits)[0]}") if bits is not None else None
        paired = ""
        if against is not None:
            difference = losses[name] - against
            paired = f"{100 * difference.std(ddof=1) / math.sqrt(len(difference)):.2f}"
        rows[name] = {"perplexity": math.exp(losses[name].mean()), "bits_per_weight": taken}
        print(f"| {name} | {taken:.3f} | {shares} | {rows[name]['perplexity']:.3f} | {paired} |", flush=True)
    for bits in averages:
        low, high = (rows[f"uniform {end}"]["perplexity"] for end in (_ends(bits)[0], _ends(bits)[-1]))
        share = bits - _ends(bits)[0]
        line, mean = (1 - share) * low + share * high, low ** (1 - share) * high**share
        print(f"uniform at {bits} bits: straight line {line:.3f}, geometric {mean:.3f}")
        rows[f"mixed {bits}"] |= {"straight_line": line, "geometric": mean}
    print(json.dumps({"model": arguments.model, "method": arguments.method, "rows": rows}))


def _ends(bits: float) -> list[int]:
    """The whole widths around a number of bits (below 4)."""
    return sorted({math.floor(bits), math.ceil(bits)})


if __name__ == "__main__":
    main()
