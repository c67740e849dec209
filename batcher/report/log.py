"""A run as lines of JSON, for programs that read logs."""

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import TextIO

import msgspec

from batcher.records import Snapshot
from batcher.report.progress import LINE_EVERY


class Log:
    """Writes one JSON object per line: what happened (`event`), when (`time`), and its fields."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """`stream` is standard error where none is given."""
        self._stream = stream or sys.stderr
        self._last: Snapshot | None = None
        self._told: Snapshot | None = None

    def tell(self, event: str, fields: Mapping[str, object]) -> None:
        """Write one event. A reader who has gone away is no reason to end a run."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"event": event, "time": now, **fields}
        with suppress(OSError):
            # Escaped to ASCII: no text can act on a terminal, nor stand in the way of the line's reader.
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()

    def show(self, snapshot: Snapshot) -> None:
        """The state of this moment, told every ten seconds of the run."""
        self._last = snapshot
        if self._told is None or snapshot.seconds - self._told.seconds >= LINE_EVERY:
            self._progress(snapshot)

    def close(self) -> None:
        """Tell the last state, once."""
        if self._last is not None and self._last is not self._told:
            self._progress(self._last)

    def _progress(self, snapshot: Snapshot) -> None:
        self._told = snapshot
        self.tell("progress", msgspec.to_builtins(snapshot._asdict()))
