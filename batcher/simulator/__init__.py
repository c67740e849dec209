"""The service, simulated: a pure model of it, that model behind HTTP, and the same in process and virtual time."""

from batcher.simulator.clock import NothingLeftError, VirtualLoop
from batcher.simulator.front import Entry, Front
from batcher.simulator.model import Fault, Settings, parse_fault
from batcher.simulator.server import Simulator, run, running, serve
from batcher.simulator.transport import ModelTransport

__all__ = [
    "Entry",
    "Fault",
    "Front",
    "ModelTransport",
    "NothingLeftError",
    "Settings",
    "Simulator",
    "VirtualLoop",
    "parse_fault",
    "run",
    "running",
    "serve",
]
