"""When a request may go: quota, capacity, retries, what may be spent; one dispatcher."""

from batcher.schedule.budget import Budget
from batcher.schedule.dispatcher import Dispatcher, Pace, Pressure, Ticket

__all__ = ["Budget", "Dispatcher", "Pace", "Pressure", "Ticket"]
