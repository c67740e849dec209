"""What a person wants to know: progress while a job runs, a summary after."""

from batcher.report.progress import Progress
from batcher.report.summary import failure_lines, render
from batcher.report.text import count, duration, money, printable

__all__ = ["Progress", "count", "duration", "failure_lines", "money", "printable", "render"]
