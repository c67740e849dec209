"""An image on disk -> a data URI, for messages that show it."""

import base64
import os
import stat
from collections.abc import Sequence
from pathlib import Path

MOST_BYTES = 10 << 20
"""Of a request with images, as the service takes it."""

_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}


class Images:
    """The images that rows may name: those below `folders`. Relative paths start from the first of these.

    A row is data, and whoever wrote it may be a stranger: without this it could show any image of this machine to the
    service. Links are followed, for they were made by whoever owns the folder.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = [os.path.abspath(folder) for folder in folders]

    def data_uri(self, path: object) -> str:
        """The filter `data_uri`: a PNG or JPEG file as text. Raises ValueError naming the path."""
        if not isinstance(path, str):
            raise ValueError(f"data_uri: a path, not {str(path)!r:.60}")
        shown = path if path.isprintable() and len(path) <= 200 else repr(path[:200])
        place = os.path.normpath(os.path.join(self._folders[0] if self._folders else os.sep, path))
        if not any(os.path.commonpath((folder, place)) == folder for folder in self._folders):
            raise ValueError(f"data_uri: {shown} is not below the folder of the job or of its input")
        try:
            content = _content(place)
        except IsADirectoryError:
            raise ValueError(f"data_uri: {shown}: no file") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ValueError(f"data_uri: {shown}: {reason}") from None
        for signature, kind in _SIGNATURES.items():
            if content.startswith(signature):
                return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        raise ValueError(f"data_uri: {shown}: neither PNG nor JPEG")


def _content(place: str) -> bytes:
    with open(place, "rb", opener=_open) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("no file")
        if status.st_size > MOST_BYTES:
            raise ValueError("larger than the 10 MiB that a request may have")
        return file.read()


def _open(place: str, flags: int) -> int:
    return os.open(place, flags | os.O_NONBLOCK)  # of a pipe nobody may be at the other end
