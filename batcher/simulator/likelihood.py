"""Log probabilities of tokens: the same for the same token at the same place, and never more than one in sum."""

import math
from zlib import crc32

from batcher.simulator import vocabulary
from batcher.simulator.wire import Likely, Logprobs, Sampled, TextLogprobs

_OTHERS = (  # what might have stood there instead; more than a request can ask for
    *(" the", " a", " of", " to", " and", " in", " is", " it", " for", " on", " with", " as"),
    *(" at", " by", " from", " that", " this", " was", " are", " be", " or", " not"),
)


def sampled(text: str, top: int, start: int = 0) -> list[Sampled]:
    """Each token of a text, with the `top` likely ones, itself first; `start` tokens stand before the text."""
    cut = vocabulary.pieces(text)
    told = []
    for place, (token, piece) in enumerate(zip(vocabulary.texts(cut), cut, strict=True), start):
        drawn = crc32(piece, place) / 2**32
        share = 0.5 + 0.49 * drawn
        likely = [Likely(token, math.log(share), list(piece))]
        at, rest = int(drawn * 1e6), 1 - share
        while len(likely) < top:
            at += 1
            other = _OTHERS[at % len(_OTHERS)]
            if other != token:
                rest /= 2
                likely.append(Likely(other, math.log(rest), list(other.encode())))
        told.append(Sampled(token, likely[0].logprob, list(piece), likely[:top]))
    return told


def chat(told: list[Sampled]) -> Logprobs | None:
    """The tokens as chat choices carry them; None without any."""
    return Logprobs(told) if told else None


def text(told: list[Sampled], offset: int = 0) -> TextLogprobs | None:
    """The tokens as choices of the completions endpoint carry them; `offset` characters stand before the first."""
    if not told:
        return None
    offsets = []
    for one in told:
        offsets.append(offset)
        offset += len(one.token)
    return TextLogprobs(
        tokens=[one.token for one in told],
        token_logprobs=[one.logprob for one in told],
        top_logprobs=[{each.token: each.logprob for each in one.top_logprobs} for one in told],
        text_offset=offsets,
    )
