"""When a request may go: quota, capacity, retries; one dispatcher."""

from batcher.schedule.dispatcher import Decision, Dispatcher, Pace, Pressure, Ticket

__all__ = ["Decision", "Dispatcher", "Pace", "Pressure", "Ticket"]
