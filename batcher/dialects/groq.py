"""How Groq speaks where it differs from the common dialect: its headers tell of the requests of a day."""

from collections.abc import Mapping

from batcher.dialects import openai
from batcher.dialects.openai import catalogue, headers, prices, read, strict_subset
from batcher.records import Failure, Limit, Reply

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

name = "groq"
api_key_env = "GROQ_API_KEY"
home = ("groq.com",)

_DAY = 86400.0


def refusal(reply: Reply) -> Failure:
    """The meaning of a reply with any status but 200. Never raises."""
    return openai.refusal(reply, _DAY)


def limits(headers: Mapping[str, str]) -> tuple[Limit, ...]:
    """The buckets that the headers describe. Never raises."""
    return openai.limits(headers, _DAY)
