"""A certificate for this machine and the authority that signed it, which nothing but benchmarks and tests trusts."""

import ssl
import tempfile
from pathlib import Path

AUTHORITY = """\
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIURsi16fV9xs6GIS5visCy7v1bEEUwCgYIKoZIzj0EAwIw
IjEgMB4GA1UEAwwXQXV0aG9yaXR5IG9mIGJlbmNobWFya3MwIBcNMjYxMTI3MTUz
MDQ5WhgPMjEyNjExMDMxNTMwNDlaMCIxIDAeBgNVBAMMF0F1dGhvcml0eSBvZiBi
ZW5jaG1hcmtzMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAELoTiAQBNgfWXpbJM
TE72hAusPGsSYKYVDSziC+CJisN68SnAxXLHNTt6O+WEq5AfYAZSLdSGdrYodQVG
GgQAIKNTMFEwHQYDVR0OBBYEFOu2JP4VgnsBO7zQcBhwc1NfbYzEMB8GA1UdIwQY
MBaAFOu2JP4VgnsBO7zQcBhwc1NfbYzEMA8GA1UdEwEB/wQFMAMBAf8wCgYIKoZI
zj0EAwIDSAAwRQIgCPp5RWGN5uXDcaAgGYV0qDUEuGcDK5WbXZ/R5S1NwikCIQDb
h9DStT/1gZVdOZc219pfRK/Ap0jA90/y3+s8nngzfw==
-----END CERTIFICATE-----
"""
_CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBxzCCAW2gAwIBAgIUW94RTaqpE/UDpqhC71/XyfdRw8QwCgYIKoZIzj0EAwIw
IjEgMB4GA1UEAwwXQXV0aG9yaXR5IG9mIGJlbmNobWFya3MwIBcNMjYxMTI3MTUz
MDQ5WhgPMjEyNjExMDMxNTMwNDlaMBQxEjAQBgNVBAMMCWxvY2FsaG9zdDBZMBMG
ByqGSM49AgEGCCqGSM49AwEHA0IABEygi1aK6hWtUbukvJVg3DXlTJ1XtYLrxEt5
qYp5q/2RbYz0aurwJiET7diFFlYyZNG/RSlzc0VpW4vyedMSBqCjgYwwgYkwGgYD
VR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMAkGA1UdEwQCMAAwCwYDVR0PBAQDAgeA
MBMGA1UdJQQMMAoGCCsGAQUFBwMBMB0GA1UdDgQWBBQ9oAMVIWR3+O80VtALNYmW
4hwYYDAfBgNVHSMEGDAWgBTrtiT+FYJ7ATu80HAYcHNTX22MxDAKBggqhkjOPQQD
AgNIADBFAiA6PPz60vLML/Qp59rF6WQN+Tzct1mpIoYLKUmPVDYa0QIhAMf9BFmW
8RK/NGdZEiPkDtd85MSiK5dXecxR43N6VvwH
-----END CERTIFICATE-----
"""
_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgYGtoGueXwL3H8ynF
t9+uccDl00BBBBmkMza6vMMKW2ehRANCAARMoItWiuoVrVG7pLyVYNw15UydV7WC
68RLeamKeav9kW2M9Grq8CYhE+3YhRZWMmTRv0Upc3NFaVuL8nnTEgag
-----END PRIVATE KEY-----
"""


def context() -> ssl.SSLContext:
    """What a server on the loopback address serves TLS with."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("certificate", _CERTIFICATE), ("key", _KEY)):
            (Path(folder) / name).write_text(text)
        made.load_cert_chain(Path(folder) / "certificate", Path(folder) / "key")
    return made
