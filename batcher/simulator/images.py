"""Images in a request: what is one, how large it is, and how many tokens that makes."""

import re
from base64 import b64decode
from binascii import Error

BUDGET = 645_120  # pixels to which an image is scaled
SIDE = 48  # pixels of a token's square
MOST = 280  # tokens of one image

_DATA_URI = re.compile(r"data:image/(?:png|jpeg|jpg);base64,", re.IGNORECASE)
_PNG = b"\x89PNG\r\n\x1a\n"
_SIZED = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}  # JPEG segments with the size


def tokens(url: str) -> int:
    """The tokens of an image that stands in a request.

    Raises ValueError when it is no base64 data URI of a PNG or JPEG.
    """
    start = _DATA_URI.match(url)
    if start is None:
        raise ValueError("Only base64 data URIs of PNG and JPEG images are supported")
    try:
        data = b64decode(url[start.end() :], validate=True)
    except Error:
        raise ValueError("The image is not valid base64") from None
    size = _size(data)
    if size is None or not all(size):
        raise ValueError("The image is neither PNG nor JPEG")
    width, height = size
    scale = (BUDGET / (width * height)) ** 0.5
    wide, high = (max(1, int(side * scale / SIDE)) for side in (width, height))
    return min(MOST, wide * high)


def _size(data: bytes) -> tuple[int, int] | None:
    """Width and height in pixels, as the file's header says them."""
    if data.startswith(_PNG) and len(data) >= 24:
        return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    at = 2 if data.startswith(b"\xff\xd8") else len(data)
    while at + 9 <= len(data) and data[at] == 0xFF:
        if data[at + 1] in _SIZED:
            return int.from_bytes(data[at + 7 : at + 9]), int.from_bytes(data[at + 5 : at + 7])
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None
