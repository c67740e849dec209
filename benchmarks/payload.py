"""What packing a body saves and costs, and what streams cost: microseconds of CPU on one core."""

import asyncio
import random
import threading
import time
import timeit
from collections.abc import Callable
from functools import partial

import msgspec

from batcher.dialects.stream import Assembler
from batcher.payload import gzipped, pack
from batcher.redact import redactor
from benchmarks import workload
from benchmarks.measure import CLIENT_CORE, Answer, Spread, pin

SIZES = (512, 1024, 2048, 4096, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
TOKENS = 500


def payload() -> list[Answer]:
    """A line for each size and packing, one for the hand-over to a thread, and those of streams and secrets."""
    pin(CLIENT_CORE)
    answers = []
    bodies = [("a prompt", prompt(size)) for size in SIZES] + [("token ids", tokens(256 << 10))]
    for what, body in bodies:
        for encoding, compression in (("msgpack", "none"), ("json", "gzip"), ("msgpack", "gzip")):
            cost = cpu(partial(packed, body, encoding, compression))
            saved = len(body) - len(packed(body, encoding, compression))
            name = f"{encoding}, {compression}: {what} of {len(body):,} bytes"
            answers.append(Answer(name, "", "", f"{saved:,} bytes ({saved / len(body):.0%}) for {show(cost)}"))
    answers.append(Answer("handing a body to a thread", "", "", show(hand_over())))
    answers += [stream(name, events) for name, events in STREAMS.items()]
    answer, key = prompt(1024), "csk-" + "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=48))
    cost = cpu(partial(redactor([key]), answer))
    answers.append(Answer(f"looking for a key in an answer of {len(answer):,} bytes", "", "", show(cost)))
    return answers


def packed(body: bytes, encoding: str, compression: str) -> bytes:
    """A body packed at any size: the threshold is what is asked for."""
    plain = pack(body, encoding, "none")[0]
    return plain if compression == "none" else gzipped(plain)


def prompt(size: int) -> bytes:
    """A chat request of about this many bytes, of words in random order."""
    words = random.Random(size).choices(workload.VOCABULARY.split(), k=size // 4)
    text = " ".join(words)[: max(100, size - 180)]
    messages = [{"role": "system", "content": workload.SYSTEM}, {"role": "user", "content": text}]
    return msgspec.json.encode({"model": workload.MODEL, "messages": messages, "max_completion_tokens": 256})


def tokens(size: int) -> bytes:
    """A completions request of about this many bytes, whose prompt is token ids."""
    ids = random.Random(size).choices(range(100_000), k=size // 6)
    return msgspec.json.encode({"model": workload.MODEL, "prompt": ids, "max_tokens": 256})


def cpu(work: Callable[[], object]) -> Spread:
    """Microseconds of CPU of one call: seven measurements of at least a hundredth of a second."""
    timer = timeit.Timer(work, timer=time.thread_time)
    number = 1
    while timer.timeit(number) < 0.01:
        number *= 2
    return Spread.of([taken / number * 1e6 for taken in timer.repeat(7, number)])


def hand_over() -> Spread:
    """Microseconds of CPU, of all threads, to have the event loop's threads do nothing once."""

    async def many(number: int) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(number):
            await loop.run_in_executor(None, threading.get_ident)

    def once() -> float:
        began = time.process_time()
        asyncio.run(many(2000))
        return (time.process_time() - began) / 2000 * 1e6

    return Spread.of([once() for _ in range(7)])


def stream(name: str, events: list[bytes]) -> Answer:
    """What it costs to put a streamed answer together, one token per event."""

    def whole() -> bytes:
        assembler = Assembler(8 << 20)
        for event in events:
            assembler.feed(event)
        return assembler.finish()

    cost = cpu(whole)
    each = cost.median / len(events)
    return Answer(f"streamed answer of {TOKENS} tokens, {name}", "", "", f"{each:.1f} µs an event; {show(cost)} in all")


def events_of(logprobs: bool) -> list[bytes]:
    """A streamed answer as a service sends it, an event a token."""
    top = {"id": "chatcmpl-0123456789ab", "object": "chat.completion.chunk", "created": 1764230000}
    top |= {"model": workload.MODEL, "system_fingerprint": "fp_0123456789"}

    def event(finish_reason: str | None = None, logprobs: object = None, **delta: str) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
        return b"data: " + msgspec.json.encode({**top, "choices": [choice]}) + b"\n\n"

    token = {"token": " word", "logprob": -0.25, "bytes": [32, 119, 111, 114, 100], "top_logprobs": []}
    given = {"content": [token]} if logprobs else None
    words = [event(content=" word", logprobs=given) for _ in range(TOKENS)]
    return [event(role="assistant", content=""), *words, event("stop"), b"data: [DONE]\n\n"]


STREAMS = {"text": events_of(False), "text with logprobs": events_of(True)}


def show(cost: Spread) -> str:
    """A cost with its quartiles."""
    digits = 0 if cost.median >= 100 else 1
    return f"{cost.median:,.{digits}f} µs ({cost.low:,.{digits}f} to {cost.high:,.{digits}f})"
