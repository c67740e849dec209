"""Images in messages: which files a row may name, and what becomes of them."""

import base64
import json
import os
from pathlib import Path

import pytest

import batcher
from batcher.images import MOST_BYTES, Images
from batcher.job import load
from batcher.plan import plan
from tests import stories

PNG = b"\x89PNG\r\n\x1a\n" + b"pixels"
JPEG = b"\xff\xd8\xff\xe0" + b"pixels"


def uri(content: bytes, kind: str = "png") -> str:
    """The data URI of an image."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def test_png_and_jpeg_are_told_by_their_content(tmp_path: Path) -> None:
    """Whatever they are called; relative paths start from the first folder, and any folder's files may be named."""
    job, data = tmp_path / "job", tmp_path / "data"
    job.mkdir()
    data.mkdir()
    (job / "a.gif").write_bytes(PNG)
    (data / "b").write_bytes(JPEG)
    (data / "link").symlink_to(job / "a.gif")
    images = Images([job, data])
    assert images.data_uri("a.gif") == uri(PNG)
    assert images.data_uri("./x/../a.gif") == uri(PNG)
    assert images.data_uri("../data/b") == uri(JPEG, "jpeg")
    assert images.data_uri(str(data / "b")) == uri(JPEG, "jpeg")
    assert images.data_uri("../data/link") == uri(PNG)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("none.png", "none.png: No such file or directory"),
        ("", ": no file"),
        (".", ".: no file"),
        ("pipe", "pipe: no file"),
        ("text.png", "text.png: neither PNG nor JPEG"),
        ("empty.png", "empty.png: neither PNG nor JPEG"),
        ("large.png", "large.png: larger than the 10 MiB that a request may have"),
        ("../secret.png", "../secret.png is not below the folder of the job or of its input"),
        ("/etc/passwd", "/etc/passwd is not below"),
        ("a/../../secret.png", "is not below"),
        ("a\0b", "embedded null byte"),
        ("a\nb", "'a\\nb': No such file"),
        (5, "a path, not '5'"),
    ],
)
def test_what_is_no_image(tmp_path: Path, path: object, said: str) -> None:
    """A row names no file outside of the folders, and each refusal names the path."""
    folder = tmp_path / "job"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(PNG)
    (folder / "text.png").write_text("hello")
    (folder / "empty.png").write_bytes(b"")
    with (folder / "large.png").open("wb") as file:
        file.write(PNG)
        file.truncate(MOST_BYTES + 1)
    os.mkfifo(folder / "pipe")
    with pytest.raises(ValueError, match="data_uri") as caught:
        Images([folder]).data_uri(path)
    assert said in str(caught.value)


def test_without_a_folder_there_are_none() -> None:
    """Nothing may be named."""
    with pytest.raises(ValueError, match="is not below"):
        Images([]).data_uri("/etc/hostname")


def test_rows_with_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the path in a column to the service; a missing file costs its row, and names the path."""
    monkeypatch.setenv("STORY_KEY", stories.KEY)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "job").mkdir()
    contents = [PNG + os.urandom(50_000 + index) for index in range(20)]
    for index, content in enumerate(contents):
        (tmp_path / "pictures" / f"{index}.png").write_bytes(content)
    rows = [{"key": f"k{index}", "text": f"../pictures/{index}.png"} for index in range(21)]
    (tmp_path / "pictures" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = [
        {"type": "text", "text": "What is in {{ text }}?"},
        {"type": "image_url", "image_url": {"url": "{{ text | data_uri }}"}},
    ]
    request = {"model": "qwen-3.8-27b", "prompt": None, "messages": [{"role": "user", "content": parts}]}
    with stories.service() as service:
        path = stories.write_job(
            tmp_path / "job",
            service.url,
            source="../pictures/*.jsonl",
            more={"request": request},
        )
        looked = plan(load(path))
        assert looked.body is not None
        assert json.loads(looked.body)["messages"][0]["content"][1]["image_url"]["url"] == uri(contents[0])
        assert 20 * 280 <= looked.prompt_tokens <= 20 * 330
        result = batcher.run(load(path))
    assert result.table().num_rows == 20
    assert len(service.book) == 20
    [failed] = result.failures().to_pylist()
    assert (failed["row"], failed["kind"]) == (20, "unsendable")
    assert failed["message"] == "request.messages: data_uri: ../pictures/20.png: No such file or directory"


def test_a_request_with_images_has_a_limit(tmp_path: Path) -> None:
    """Two that fit alone may not fit together."""
    for name in "ab":
        with (tmp_path / f"{name}.png").open("wb") as file:
            file.write(PNG)
            file.truncate(5 << 20)
    parts = [{"type": "image", "image": f"{{{{ {name} | data_uri }}}}"} for name in "ab"]
    (tmp_path / "rows.jsonl").write_text('{"a": "a.png", "b": "b.png"}\n')
    job = batcher.Job(
        input={"path": "rows.jsonl"},
        request={"model": "m", "messages": [{"role": "user", "content": parts}]},
        service={"base_url": "simulator"},
        output={"path": "out"},
        folder=tmp_path,
    )
    [(row, message)] = plan(job).unsendable
    assert row == 0
    assert message.startswith("a request with images may have 10 MiB, and this one has 13,9")
