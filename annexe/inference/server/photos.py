"""Photos as clients send them, checked before they enter the queue."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import time
import urllib.request
from urllib.parse import urlsplit

from PIL import Image

from annexe.datasets.image_files import Upload
from annexe.datasets.photos import check_header
from annexe.errors import UserError
from annexe.inference.server.errors import ApiError, invalid
from annexe.inference.server.limits import Limits

# What Pillow is allowed to take a file from the network for
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_FETCH_SECONDS = 10.0
_CHUNK = 2**16  # bytes


def decode_photo(text: str) -> bytes:
    """The bytes of a photo in base64, alone or as a data URL.

    Raises:
        ApiError: it is neither.
    """
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise invalid(
                "invalid_image", "the data URL of the image must begin 'data:image/jpeg;base64,'"
            )
    try:
        # Lines may be wrapped, as the tool base64 does it
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        raise invalid(
            "invalid_image", "the image is not base64; send the bytes of a file in base64"
        ) from None
    if not data:
        raise invalid("invalid_image", "the image is empty; send the bytes of a file in base64")
    return data


def is_url(text: str) -> bool:
    """Whether a text is the address of a photo on the web."""
    return text[:8].lower().startswith(("http://", "https://"))


def check_photo(data: bytes, name: str, limits: Limits) -> Upload:
    """A photo that can be read as far as its header tells.

    Args:
        data: bytes of its file.
        name: for messages.
        limits: of the server.

    Raises:
        ApiError: it has too many pixels, is none of the formats, or cannot be read.
    """
    upload = Upload(data, name)
    is_known = True
    num_pixels = 0
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            num_pixels = image.width * image.height
    except Image.DecompressionBombError:
        raise _too_large(name, limits) from None
    except Exception:  # a damaged file makes Pillow raise errors of a dozen kinds
        is_known = False
    if num_pixels > limits.max_pixels:
        raise _too_large(name, limits)

    # The predictor's own words for what is wrong
    try:
        check_header(upload)
    except UserError as error:
        raise invalid("invalid_image", str(error)) from None
    if not is_known:
        raise invalid("invalid_image", f"photo '{name}' is of another format; send JPEG or PNG")
    return upload


def _too_large(name: str, limits: Limits) -> ApiError:
    limit = f"{limits.max_pixels / 1e6:g} million pixels"
    return ApiError(413, "image_too_large", f"photo '{name}' has more than {limit}; scale it down")


def fetch_photo(url: str, limits: Limits) -> bytes:
    """The file at an address.

    Raises:
        ApiError: it cannot be fetched, or is too large.
    """
    # HTTP alone: no files of this machine, and no FTP
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)

    # One byte past the limit is enough to know
    try:
        if not urlsplit(url).hostname:
            raise ValueError("it names no host")
        with opener.open(url, timeout=_FETCH_SECONDS) as response:
            data = _read(response, limits.max_body_bytes + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())[:100]
        raise invalid(
            "invalid_image_url", f"cannot fetch the image ({reason}); send it as a data URL"
        ) from None
    if len(data) > limits.max_body_bytes:
        raise ApiError(
            413,
            "image_too_large",
            f"the image at this address has more than {limits.max_body_mb:g} MB; scale it down",
        )
    return data


def _read(response: http.client.HTTPResponse, num_bytes: int) -> bytes:
    """At most so many bytes of a response.

    Raises:
        TimeoutError: they trickle in.
    """
    end = time.monotonic() + _FETCH_SECONDS
    data = b""
    while len(data) < num_bytes and (chunk := response.read1(_CHUNK)):
        data += chunk
        if time.monotonic() > end:
            raise TimeoutError(f"it takes more than {_FETCH_SECONDS:g} s")
    return data[:num_bytes]
