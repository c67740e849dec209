"""The service, simulated: a pure model of it, and that model behind HTTP."""

from batcher.simulator.model import Fault, Settings, parse_fault
from batcher.simulator.server import Entry, Simulator, run, running, serve

__all__ = ["Entry", "Fault", "Settings", "Simulator", "parse_fault", "run", "running", "serve"]
