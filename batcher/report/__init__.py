"""What a person wants to know: progress while a job runs, a look from outside, a summary after."""

from batcher.report.log import Log
from batcher.report.progress import Progress
from batcher.report.status import status_text
from batcher.report.summary import failure_lines, render
from batcher.report.text import count, duration, money, printable

__all__ = ["Log", "Progress", "count", "duration", "failure_lines", "money", "printable", "render", "status_text"]
