"""Images of a request: data URLs, checked against limits before they are decoded.

Knows data URLs and files of images. Knows nothing of models or HTTP. Fetches nothing.
"""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeflow.batch.messages import refuse_unknown, short
from moeflow.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from moeflow.server.settings import ServerSettings

_DATA_URL = re.compile(r"data:([\w.+/-]*)(?:;[\w.+=-]+)*;base64,", re.ASCII)
_DETAILS = ("auto", "low", "high", "original")  # without effect: the model's processor has sizes of its own
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_NAMES = "PNG, JPEG, WebP or GIF"


@dataclass(frozen=True)
class EncodedImage:
    """An image that is not decoded yet.

    Args:
        name: what an error calls it.
        data: its file, in base64.
    """

    name: str
    data: str


class ImageParts:
    """The image parts of one request.

    Args:
        settings: their limits.
        refusal: why the model takes no images; "" where it does.
    """

    def __init__(self, settings: ServerSettings, refusal: str) -> None:
        self._settings = settings
        self._refusal = refusal
        self._num_read = 0

    def read(self, name: str, part: dict[str, Any]) -> EncodedImage:
        """Return the image of a part.

        Args:
            name: what an error calls it.
            part: {"type": "image_url", "image_url": {"url", "detail"}}.

        Raises:
            ConfigError: the model takes none, there are too many, it is too large, or it is no data URL.
        """
        if self._refusal:
            raise ConfigError(f"messages has an image as {name}; this model reads no images: {self._refusal}")
        refuse_unknown(part, ("type", "image_url"), name)
        given = part.get("image_url")
        if not isinstance(given, dict) or not isinstance(given.get("url"), str):
            raise ConfigError(f'messages has {short(given)} as image_url of {name}; it must be {{"url": "data:..."}}')
        refuse_unknown(given, ("url", "detail"), f"the image_url of {name}")
        if given.get("detail") not in (None, *_DETAILS):
            allowed = ", ".join(_DETAILS)
            raise ConfigError(
                f"messages has the detail {short(given['detail'])} in {name}; it must be one of {allowed}"
            )
        self._num_read += 1
        most = self._settings.max_images
        if self._num_read > most:
            raise ConfigError(f"messages has more than {most} images; leave some out")
        url: str = given["url"]
        found = _DATA_URL.match(url)
        if found is None:
            raise ConfigError(
                f"messages has the address {short(url)} as image of {name}; this server fetches nothing: send the "
                "image itself as data:image/png;base64,..."
            )
        size = (len(url) - found.end()) * 3 // 4
        if size > self._settings.max_image_bytes:
            raise ConfigError(
                f"messages has an image of {size:,} bytes as {name}; it must be {self._settings.max_image_bytes:,} at "
                "most: send a smaller one"
            )
        return EncodedImage(name, url[found.end() :])


def decode_images(messages: list[dict[str, Any]], max_pixels: int) -> list[dict[str, Any]]:
    """Return messages whose images are decoded: of Pillow, red, green and blue, upright, of moving ones the first.

    Args:
        messages: of `read_conversation`.
        max_pixels: most of all images together.

    Raises:
        ConfigError: one is broken, of another format, or they have too many pixels.
    """
    left = max_pixels
    decoded = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            parts = []
            for part in content:
                if part["type"] == "image":
                    image = _decode(part["image"], left, max_pixels)
                    left -= image.width * image.height
                    part = {"type": "image", "image": image}
                parts.append(part)
            message = {**message, "content": parts}
        decoded.append(message)
    return decoded


def _decode(encoded: EncodedImage, left: int, max_pixels: int) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = encoded.name
    try:
        data = base64.b64decode(encoded.data, validate=True)
    except ValueError as error:
        raise ConfigError(f"messages has an image as {name} that is not base64 ({error}): encode it again") from None
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height <= left:
                return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise ConfigError(f"messages has an image as {name} that is broken or none: it must be {_NAMES}") from None
    except Image.DecompressionBombError:
        raise ConfigError(f"messages has an image as {name} with too many pixels: send a smaller one") from None
    except Exception as error:  # of a decoder, whatever is in the file
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(f"messages has an image as {name} that is broken ({told}): send a whole {_NAMES}") from None
    raise ConfigError(
        f"messages has an image of {width:,} x {height:,} pixels as {name}; all images of a request have "
        f"{max_pixels:,} pixels at most: send smaller ones"
    )
