"""When a request may go: quota, capacity, retries, what may be spent; one dispatcher."""

from batcher.schedule.budget import Budget
from batcher.schedule.dispatcher import Decision, Dispatcher, Pace, Pressure, Ticket

__all__ = ["Budget", "Decision", "Dispatcher", "Pace", "Pressure", "Ticket"]
