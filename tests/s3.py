"""An S3 service on this machine (moto's), for tests of object stores."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from moto.server import ThreadedMotoServer
from pyarrow import fs

BUCKET = "bucket"
"""The bucket that is there from the start."""


@contextmanager
def served() -> Iterator[str]:
    """The service, empty but for its bucket; gives its URL. While it runs, the environment leads here."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "story-id",
        "AWS_SECRET_ACCESS_KEY": "story-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        system, bucket = fs.FileSystem.from_uri(f"s3://{BUCKET}?allow_bucket_creation=true&allow_bucket_deletion=true")
        system.create_dir(bucket)
        try:
            yield settings["AWS_ENDPOINT_URL"]
        finally:
            system.delete_dir(bucket)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        server.stop()
