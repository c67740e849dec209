"""A job forecast by running it: the real engine against a model of its service, in virtual time; nothing is sent.

`observed` reads in an output what the service is like, `rows` takes the rows, `stage` plays the run, `forecast` says
what it comes to.
"""

from batcher.rehearse.forecast import (
    Change,
    Forecast,
    Given,
    foretell,
    has_plan,
    kept,
    piloted,
    rehearse,
    render,
    served,
)
from batcher.rehearse.observed import Observed, observe

__all__ = [
    "Change",
    "Forecast",
    "Given",
    "Observed",
    "foretell",
    "has_plan",
    "kept",
    "observe",
    "piloted",
    "rehearse",
    "render",
    "served",
]
