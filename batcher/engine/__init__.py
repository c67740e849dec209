"""The engine joins the rooms: `attempt` is a row's life, `feed` brings rows, `publish` takes them, `run` is around."""

from batcher.engine.prepared import Prepared, prepare
from batcher.engine.run import run

__all__ = ["Prepared", "prepare", "run"]
