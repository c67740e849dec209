"""Secrets cut out of what comes back."""

import base64
import json
import re
from collections.abc import Callable
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batcher.redact import redactor

SECRET = "csk-0123456789abcdef"


@pytest.mark.parametrize(
    "write",
    [
        lambda secret: json.dumps(secret)[1:-1],
        lambda secret: json.dumps(secret)[1:-1].replace("/", r"\/"),
        lambda secret: "".join(f"\\u{ord(letter):04X}" for letter in secret),
        lambda secret: secret[:3] + "".join(f"\\u{ord(letter):04x}" for letter in secret[3:5]) + json_text(secret[5:]),
        lambda secret: quote(secret, safe=""),
        lambda secret: re.sub("%..", lambda found: found[0].lower(), quote(secret, safe="")),
        *(
            lambda secret, before=before: base64.b64encode(f"{before}{secret}; and more".encode()).decode()
            for before in ("", "me:", "Bearer ", "a", "ab")
        ),
        lambda secret: base64.urlsafe_b64encode(f"me:{secret}".encode()).decode(),
    ],
    ids=lambda _: "",
)
@pytest.mark.parametrize("secret", [SECRET, 'sk/0"123?45\\6789+ab=', "ключ-0123456789~"])
def test_a_secret_is_cut_out_in_whatever_form_it_comes_back(secret: str, write: Callable[[str], str]) -> None:
    """Base64 at any offset, URL-quoted and JSON-escaped forms are known; nothing that gives the secret is left."""
    written = write(secret)
    redacted = redactor([secret, "short"])(f'{{"message":"the key {written} is wrong, says short \\u0041"}}'.encode())
    assert b"[redacted]" in redacted
    assert b"short" in redacted
    assert written.encode() not in redacted
    message = json.loads(redacted)["message"]
    assert secret not in unquote(message)
    letters = re.search("key (.*) is wrong", message)
    assert letters is not None
    left = letters[1].replace("[redacted]", "")
    assert len(left) < len(written) - len(secret) + 6


def json_text(text: str) -> str:
    """A text as it stands in JSON."""
    return json.dumps(text)[1:-1]


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_what_is_no_secret_stays(before: bytes, after: bytes) -> None:
    """Around a secret every byte stays as it is."""
    redact = redactor([SECRET])
    assert redact(before + after) == before + after
    assert redact(before + SECRET.encode() + after) == before + b"[redacted]" + after
