"""How Cerebras speaks where it differs from the common dialect: names, a version header, prices."""

from collections.abc import Mapping

from batcher.dialects import prices as _prices
from batcher.dialects.openai import limits, refusal
from batcher.dialects.openai import understood as read
from batcher.records import Price

__all__ = [
    "api_key_env",
    "catalogue",
    "headers",
    "home",
    "limits",
    "name",
    "prices",
    "read",
    "refusal",
    "strict_subset",
]

name = "cerebras"
api_key_env = "CEREBRAS_API_KEY"
home = ("cerebras.ai",)
catalogue: str | None = "/public/v1"
strict_subset = True
headers: Mapping[str, str] = {"X-Cerebras-Version-Patch": "2"}
prices: Mapping[str, Price] = _prices.CEREBRAS
