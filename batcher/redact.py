"""Secrets cut out of what a service sends back, in whatever form they stand there."""

import json
import re
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Iterable, Iterator
from typing import Final
from urllib.parse import quote, quote_plus

MARK: Final = b"[redacted]"
SHORTEST: Final = 8
"""Characters: anything shorter would be found in ordinary text."""

_ESCAPED: Final = re.compile(rb"\\u00[2-7]")
"""A plain character that JSON writes as a number; it need not, so this is rare."""


def redactor(secrets: Iterable[str]) -> Callable[[bytes], bytes]:
    """What cuts these secrets out of bytes: as they are, and in base64, URL-quoted and JSON-escaped."""
    words = [secret.encode("utf-8", "surrogateescape") for secret in secrets if len(secret) >= SHORTEST]
    forms = sorted({form for word in words for form in _forms(word)}, key=len, reverse=True)
    spelled = re.compile(b"|".join(map(_spelled, words)))

    def redact(data: bytes) -> bytes:
        for form in forms:
            if form in data:
                data = data.replace(form, MARK)
        if b"\\" in data and words and _ESCAPED.search(data):
            data = spelled.sub(MARK, data)
        return data

    return redact


def _forms(word: bytes) -> Iterator[bytes]:
    """The ways in which a secret is written that need no look at each character."""
    text = word.decode("utf-8", "surrogateescape")
    forms = {word, json.dumps(text)[1:-1].encode()}
    for quoted in (quote(word, safe=""), quote_plus(word), quote(word)):
        forms |= {quoted.encode(), re.sub("%..", lambda found: found[0].lower(), quoted).encode()}
    # Whatever stands before the secret shifts its bits: three ways, each without the characters that it shares.
    for before, shared in ((b"", 0), (b"\0", 2), (b"\0\0", 3)):
        whole = before + word
        whole = whole[: len(whole) // 3 * 3]
        forms |= {b64encode(whole)[shared:], urlsafe_b64encode(whole)[shared:]}
    for form in forms:
        yield form
        yield form.replace(b"/", rb"\/")


def _spelled(word: bytes) -> bytes:
    """A pattern for a secret any of whose characters JSON may have written as numbers."""
    pattern = b""
    for letter in word.decode("utf-8", "surrogateescape"):
        plain = re.escape(letter.encode("utf-8", "surrogateescape"))
        units = letter.encode("utf-16-be", "surrogatepass")
        numbers = b"".join(rb"\\u%s" % units[at : at + 2].hex().encode() for at in range(0, len(units), 2))
        pattern += rb"(?:%s|\\%s|(?i:%s))" % (plain, plain, numbers)
    return pattern
