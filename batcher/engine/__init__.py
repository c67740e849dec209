"""The engine joins the rooms: `attempt` is a row's life, `feed` brings rows, `publish` takes them, `run` is around."""

from batcher.engine.again import reopened, retry
from batcher.engine.prepared import Prepared, not_ours, prepare, scored_otherwise
from batcher.engine.reparse import reparse
from batcher.engine.run import RARELY, run
from batcher.engine.selection import LOOKED_AT, Selection, first_rows, refuse_unserved, select, unscored

__all__ = [
    "LOOKED_AT",
    "RARELY",
    "Prepared",
    "Selection",
    "first_rows",
    "not_ours",
    "prepare",
    "refuse_unserved",
    "reopened",
    "reparse",
    "retry",
    "run",
    "scored_otherwise",
    "select",
    "unscored",
]
