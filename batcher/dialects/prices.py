"""What tokens cost at list price, and when that was true."""

from collections.abc import Mapping
from datetime import date
from typing import Final

from batcher.records import Price, Rates

PRICES_AS_OF: Final = date(2026, 10, 31)
"""When the tables below were what the services' own price lists and public catalogues said."""

CEREBRAS: Final[Mapping[str, Price]] = {
    "gpt-oss-120b": Price(input=0.35, output=0.75),
    "qwen-3.8-27b": Price(input=0.99, output=1.49),
}
"""Models that are shared and served. Tokens from the cache cost as others do, and so do all tiers while they are in
preview: the service's pages on prompt caching and on service tiers."""


def cost(price: Price, prompt: int, cached: int, completion: int, tier: str | None) -> float:
    """USD for one answer: `prompt` tokens, of which `cached` came from the cache, and `completion` tokens.

    `tier` is the one that served it; of `auto`, which may have been any, the dearest.
    """
    match tier:
        case "flex" | "priority":
            rates = (price.flex if tier == "flex" else price.priority) or price
        case "auto":
            every = (price, price.flex or price, price.priority or price)
            return max(_cost(rates, prompt, cached, completion) for rates in every)
        case _:
            rates = price
    return _cost(rates, prompt, cached, completion)


def _cost(rates: Rates, prompt: int, cached: int, completion: int) -> float:
    from_cache = min(cached, prompt)
    cached_rate = rates.input if rates.cached is None else rates.cached
    return ((prompt - from_cache) * rates.input + from_cache * cached_rate + completion * rates.output) / 1_000_000
