"""The engine joins the rooms: `attempt` is a row's life, `feed` brings rows, `publish` takes them, `run` is around."""

from batcher.engine.prepared import Prepared, prepare
from batcher.engine.run import RARELY, run

__all__ = ["RARELY", "Prepared", "prepare", "run"]
