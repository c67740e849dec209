"""The service, simulated: a pure model of it, that model behind HTTP, and the same in process and virtual time."""

from batcher.simulator.clock import NothingLeftError, VirtualLoop
from batcher.simulator.front import Entry, Front
from batcher.simulator.model import Fault, Settings, parse_capacity, parse_drift, parse_fault, parse_limit
from batcher.simulator.recorded import Recorded
from batcher.simulator.recorded import load as load_answers
from batcher.simulator.server import Simulator, run, running, serve
from batcher.simulator.stream import StreamFault
from batcher.simulator.transport import ModelTransport

__all__ = [
    "Entry",
    "Fault",
    "Front",
    "ModelTransport",
    "NothingLeftError",
    "Recorded",
    "Settings",
    "Simulator",
    "StreamFault",
    "VirtualLoop",
    "load_answers",
    "parse_capacity",
    "parse_drift",
    "parse_fault",
    "parse_limit",
    "run",
    "running",
    "serve",
]
