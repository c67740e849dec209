"""What tokens cost at list price, and when that was true."""

from collections.abc import Mapping
from datetime import date
from typing import Final

from batcher.records import Price

PRICES_AS_OF: Final = date(2026, 10, 31)

CEREBRAS: Final[Mapping[str, Price]] = {
    "gpt-oss-120b": Price(input=0.35, output=0.75),
    "qwen-3.8-27b": Price(input=0.99, output=1.49),
}


def cost(price: Price, prompt: int, cached: int, completion: int) -> float:
    """USD for one answer: `prompt` tokens, of which `cached` came from the cache, and `completion` tokens."""
    from_cache = min(cached, prompt)
    cached_price = price.input if price.cached is None else price.cached
    return ((prompt - from_cache) * price.input + from_cache * cached_price + completion * price.output) / 1_000_000
