"""Replay recorded routes and write the hit rates that `moeflow fit` interpolates, as moeflow/fit/measured_curves.py.

    python scripts/make_hit_curves.py --data ../shared/data --demo demo.trace

The traces are those of gpt-oss-20b and OLMoE in the data folder, and one of the demo model:

    moeflow trace record DEMO --prompts PROMPTS.jsonl -o demo.trace --max-new-tokens 160

Only the curves' numbers are kept. The last line printed is one JSON object.
"""

import argparse
import json
import tempfile
from pathlib import Path

from moeflow.atomic_file import write_atomically
from moeflow.fit.hit_curves import curve_of_trace
from moeflow.trace.convert import convert_trace
from moeflow.trace.trace import RoutingTrace

OUT = Path(__file__).resolve().parent.parent / "moeflow/fit/measured_curves.py"
RESIDENCIES = (5.0, 8.0, 10.0, 12.5, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0, 60.0, 75.0, 90.0)
_MOST_TOKENS = 12_000  # of a trace
_HEAD = '''"""Hit rates of measured models' decode steps, written by scripts/make_hit_curves.py. Do not edit.

(experts a layer, experts a token) -> (model, LFRU from empty, LFRU as a sequence leaves it to the next, Belady),
each at `RESIDENCIES` percent of all experts in one pool. Knows nothing of models.
"""

RESIDENCIES = {residencies}
CURVES: dict[tuple[int, int], tuple[str, tuple[float, ...], tuple[float, ...], tuple[float, ...]]] = {{
'''


def main(argv=None) -> None:
    """Write the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the recorded traces")
    parser.add_argument("--demo", type=Path, required=True, help="trace of the demo model")
    arguments = parser.parse_args(argv)
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        converted = {name: Path(folder) / f"{name}.trace" for name in ("gpt-oss-20b", "OLMoE")}
        convert_trace(arguments.data / "gpt_oss_20b", converted["gpt-oss-20b"])
        convert_trace(arguments.data / "olmoe_trace/trace_olmoe_299.jsonl", converted["OLMoE"], num_experts=64)
        for name, file in (*converted.items(), ("the demo model", arguments.demo)):
            trace = RoutingTrace.open(file)
            curve = curve_of_trace(file, RESIDENCIES, most_tokens=_MOST_TOKENS)
            padded = {
                key: tuple(round(float(curve.at(share / 100)[number]), 4) for share in RESIDENCIES)
                for number, key in enumerate(("low", "mid", "high"))
            }
            curves[max(trace.experts_per_layer), trace.top_k] = (name, *padded.values())
    text = _HEAD.format(residencies=RESIDENCIES)
    for shape, (name, *rates) in sorted(curves.items()):
        lines = "".join(f"        {rate},\n" for rate in rates)
        text += f'    {shape}: (\n        "{name}",\n{lines}    ),\n'
    write_atomically(OUT, text + "}\n", None)
    print(json.dumps({str(shape): rates for shape, rates in curves.items()}))


if __name__ == "__main__":
    main()
