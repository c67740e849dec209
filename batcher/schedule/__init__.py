"""When a request may go: quota, capacity, retries; one dispatcher."""

from batcher.schedule.dispatcher import Dispatcher, Pace, Pressure, Ticket

__all__ = ["Dispatcher", "Pace", "Pressure", "Ticket"]
