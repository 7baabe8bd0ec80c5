"""generation_config.json: what a checkpoint says of generating, checked before anything large is read.

Knows the file. Knows nothing of sampling: see `forward.sampling_settings`.
"""

import json
from pathlib import Path

from moeflow.errors import ConfigError
from moeflow.hf.version import parts_of_transformers
from moeflow.hf.wall import one_line, wall

with parts_of_transformers():
    from transformers import GenerationConfig


def check_generation_file(folder: Path) -> None:
    """Refuse a generation_config.json that transformers would refuse. One that is no JSON it leaves aside.

    Args:
        folder: of the checkpoint; it may lack the file.

    Raises:
        ConfigError: the file holds no object, or a field that cannot be.
    """
    file = folder / "generation_config.json"

    def tell(error: BaseException) -> ConfigError:
        return ConfigError(f"{file}: {one_line(error)}. Correct the field, or download the file again.")

    with wall(tell):
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if not isinstance(fields, dict):
            raise ConfigError(
                f"{file} holds a {type(fields).__name__} where a JSON object belongs. Download it again, or delete it."
            )
        GenerationConfig.from_dict(fields)
