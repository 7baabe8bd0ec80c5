"""Servers in processes of their own: moeflow's command, and llama-cpp-python's.

Knows commands and ports. Knows nothing of what is measured.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

START_S = 600  # in which a server must answer
STOP_S = 60


class ServerProcess:
    """A server that answers while the `with` block runs.

    Args:
        command: starts it on the port of `free_port`, "{port}" in it standing for that.
        threads: of its arithmetic.

    Attributes:
        url: where it answers.
    """

    def __init__(self, command: list[str], threads: int) -> None:
        port = str(free_port())
        self.url = f"http://127.0.0.1:{port}"
        self._command = [part.replace("{port}", port) for part in command]
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def __enter__(self) -> "ServerProcess":
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            self._command, stdout=self._log, stderr=subprocess.STDOUT, env=self._environment
        )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def stats(self) -> dict:
        """Return moeflow's figures."""
        return httpx.get(f"{self.url}/stats", trust_env=False, timeout=60).json()

    def _wait(self) -> None:
        """Wait until the model is there."""
        end_s = time.monotonic() + START_S
        while time.monotonic() < end_s:
            if self._process.poll() is not None:
                self._log.seek(0)
                told = (self._log.read().strip().splitlines() or ["nothing is said"])[-1]
                raise OSError(f"{' '.join(self._command[:4])} ended with {self._process.returncode}: {told}")
            try:
                if httpx.get(f"{self.url}/v1/models", trust_env=False, timeout=60).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise OSError(f"{' '.join(self._command[:4])} did not answer in {START_S} s")


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def moeflow_server(model: Path, memory: str, threads: int, *options: str) -> ServerProcess:
    """Return `moeflow serve` of a model on the CPU."""
    command = [sys.executable, "-m", "moeflow", "serve", str(model), "--port", "{port}"]
    return ServerProcess([*command, "--device", "cpu", "--expert-memory", memory, *options], threads)


def llama_server(python: str, gguf: Path, threads: int, context: int) -> ServerProcess:
    """Return llama-cpp-python's server of a GGUF file, whose answers are not interrupted by the next request."""
    command = [python, "-m", "llama_cpp.server", "--model", str(gguf), "--host", "127.0.0.1", "--port", "{port}"]
    options = {"n_ctx": context, "n_threads": threads, "n_threads_batch": threads, "interrupt_requests": False}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return ServerProcess([*command, *flags], threads)
