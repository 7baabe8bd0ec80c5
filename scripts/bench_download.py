"""Downloads from a hub on this machine: throughput against curl's, bytes fetched twice after kills, headers over HTTP.

    python scripts/bench_download.py [--megabytes 2000] [--rounds 5] [--kills 20] [--folder /dev/shm]

curl fetches the same file from the same server in one request; moeflow also checks its sha256, and has to list the
repository first. Both run in turns. Kills come at random points of the transfer; what is fetched twice is counted by
the server. The headers are of 163 shards, as DeepSeek-V3 in bfloat16 would have them, with 50 ms a request; `moeflow
fit` of that id is a whole command, run once by a machine that it has to measure first and once more.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # for helpers.hub_server, which no install brings

_FETCH = """
import os, sys, time
from moeflow.hub.download import fetch_model
done = fetch_model("org/model", sys.argv[1])
print(done.seconds)
"""
_HEADERS = """
import os, time
from moeflow.hub.headers import remote_checkpoint
from moeflow.hub.repository import Repository
begin = time.perf_counter()
remote_checkpoint(Repository("org/model"))
print(time.perf_counter() - begin)
from moeflow.hardware import process_memory_bytes
print(process_memory_bytes()[1])
"""


def environment(url: str) -> dict[str, str]:
    """Return the environment of a command that asks the hub at `url`."""
    return {**os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}


def run(code: str, url: str, *arguments: str) -> list[float]:
    """Run code in a fresh process; return the numbers it printed."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(url))
    return [float(line) for line in done.stdout.split()]


def throughput(folder: Path, num_bytes: int, rounds: int) -> dict[str, list[float]]:
    """Return bytes a second of curl and of moeflow, [rounds] each, in turns."""
    source = folder / "source"
    source.mkdir()
    with open(source / "model.safetensors", "wb") as file:
        for _ in range(num_bytes >> 20):
            file.write(random.randbytes(1 << 20))
    size = (source / "model.safetensors").stat().st_size
    server = subprocess.Popen(
        [sys.executable, "-m", "helpers.hub_server", str(source)],
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    url = server.stdout.readline().strip()
    found: dict[str, list[float]] = {"curl": [], "moeflow": []}
    try:
        for round_ in range(-1, rounds):  # the first is not counted: the server computes its sha256
            out = folder / "out"
            begin = time.perf_counter()
            address = f"{url}/org/model/resolve/main/model.safetensors"
            subprocess.run(["curl", "-sSfL", "-o", str(out), address], check=True)
            seconds = {"curl": time.perf_counter() - begin}
            out.unlink()
            (seconds["moeflow"],) = run(_FETCH, url, str(out))
            shutil.rmtree(out)
            for name, taken in seconds.items():
                if round_ >= 0:
                    found[name].append(size / taken)
    finally:
        server.stdin.close()
        server.wait()
        shutil.rmtree(source)
    return found


def kills(folder: Path, count: int) -> dict[str, object]:
    """Kill a download at random points until it ends; return what the server sent more than the files' bytes."""
    from helpers.hub_server import hub

    draw, twice, num_kills = random.Random(0), [], 0
    files = {"config.json": b"{}", **{f"model-{n}.safetensors": draw.randbytes(100_000_000) for n in range(4)}}
    size, to = sum(map(len, files.values())), folder / "killed"
    command = [sys.executable, "-m", "moeflow", "download", "org/model", "--to", str(to)]
    with hub(files) as server:
        while True:
            process = subprocess.Popen(command, env=environment(server.url), stdout=subprocess.DEVNULL)
            at = server.total_sent + draw.randrange(1, 2 * size // count)
            if num_kills == count:
                at = sys.maxsize
            server.on_sent = lambda total, at=at, process=process: process.kill() if total >= at else None
            if process.wait() == 0:
                break
            num_kills += 1
            server.on_sent = lambda total: None
            server.sent()  # waits for what is on its way
            twice.append(server.total_sent)
        intact = all((to / name).read_bytes() == content for name, content in files.items())
        more = server.total_sent - size
    shutil.rmtree(to)
    return {"kills": num_kills, "bytes_twice": more, "bytes_twice_a_kill": more / max(num_kills, 1), "intact": intact}


def headers(folder: Path, latency_s: float = 0.05) -> dict[str, float]:
    """Return the seconds and the peak memory of reading the headers of 163 shards, and the seconds of `moeflow fit`."""
    from helpers.hub_server import hub
    from helpers.large_checkpoint import LARGE_CONFIG, write_large_checkpoint

    source = folder / "large"
    source.mkdir()
    write_large_checkpoint(source)
    (source / "config.json").write_text(json.dumps(LARGE_CONFIG))
    fit = [sys.executable, "-m", "moeflow", "fit", "org/model", "--memory", "2TB", "--json"]
    names = sorted(path.name for path in source.iterdir())
    with hub({name: source / name for name in names}) as server:
        server._digests = {(name, source / name): "0" * 64 for name in names}
        server.latency_s = latency_s
        seconds, peak = run(_HEADERS, server.url)
        num_requests, fits = len(server.requests), []
        for _ in range(2):
            begin = time.perf_counter()
            own = environment(server.url) | {"MOEFLOW_CACHE": str(folder / "cache")}
            done = subprocess.run(fit, capture_output=True, text=True, env=own)
            assert done.returncode == 0, done.stderr
            fits.append(time.perf_counter() - begin)
    measured = {"headers_s": seconds, "headers_peak_bytes": peak, "headers_requests": num_requests}
    return {**measured, "first_fit_s": fits[0], "fit_s": fits[1]}


def main(argv=None) -> None:
    """Print the table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000, help="size of the file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="for the files: a disk that is slow hides the difference")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        rates = throughput(folder, arguments.megabytes << 20, arguments.rounds)
        killed = kills(folder, arguments.kills)
        read = headers(folder)
    print("| what | median MB/s | range |\n|---|---|---|")
    for who, values in rates.items():
        low, middle, high = (value / 1e6 for value in (min(values), statistics.median(values), max(values)))
        print(f"| {who} | {middle:.0f} | {low:.0f} to {high:.0f} |")
    ratio = statistics.median(own / curl for own, curl in zip(rates["moeflow"], rates["curl"], strict=True))
    print(f"\nof curl's throughput, sha256 included: {ratio:.2f} (goal 0.9)")
    print(f"{killed['kills']} kills: {killed['bytes_twice_a_kill'] / 1e6:.1f} MB a kill fetched twice (limit 8.4)")
    print(f"headers of 163 shards at 50 ms a request: {read['headers_s']:.1f} s (limit 20)")
    print(
        f"moeflow fit of them: {read['fit_s']:.1f} s; {read['first_fit_s']:.1f} s with measuring the machine (limit 20)"
    )
    medians = {f"{who}_bytes_s": statistics.median(values) for who, values in rates.items()}
    print(json.dumps({**medians, "ratio": ratio, **killed, **read}))


if __name__ == "__main__":
    main()
