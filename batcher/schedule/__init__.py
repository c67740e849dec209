"""When a request may go: quota, capacity, retries, what may be spent, what is needed by when; one dispatcher."""

from batcher.schedule.budget import Budget
from batcher.schedule.deadline import Deadline
from batcher.schedule.dispatcher import Decision, Dispatcher, Pace, Pressure, Ticket

__all__ = ["Budget", "Deadline", "Decision", "Dispatcher", "Pace", "Pressure", "Ticket"]
