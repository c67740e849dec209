"""Where files lie, on this machine or in an object store behind a URI; and how results are put there whole."""

from batcher.store.results import FOLDERS, UNFINISHED, Bucket, Folder, Results, not_here, results_at
from batcher.store.uri import connect, is_remote, reading, reason, unfit

__all__ = [
    "FOLDERS",
    "UNFINISHED",
    "Bucket",
    "Folder",
    "Results",
    "connect",
    "is_remote",
    "not_here",
    "reading",
    "reason",
    "results_at",
    "unfit",
]
