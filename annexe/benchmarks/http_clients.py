"""Clients that keep a server busy, with nothing but the standard library."""

from __future__ import annotations

import base64
import http.client
import json
import threading
import time
from dataclasses import dataclass
from typing import Any

_WAIT_SECONDS = 600.0  # for one answer


@dataclass(frozen=True)
class Load:
    """What clients ask, and for how long.

    Attributes:
        port: of a server on this machine.
        photos: files of JPEGs, which the clients take in turn.
        questions: asked of each.
        num_clients: at once, each with one request at a time.
        warmup_seconds: that do not count.
        seconds: that count, behind them.
    """

    port: int
    photos: list[bytes]
    questions: list[str]
    num_clients: int
    warmup_seconds: float
    seconds: float


@dataclass(frozen=True)
class Answered:
    """What clients got.

    Attributes:
        per_second: answers.
        latencies: seconds of each request that counts.
        num_failed: requests without an answer, warm-up included.
    """

    per_second: float
    latencies: list[float]
    num_failed: int


def run_clients(load: Load) -> Answered:
    """Let all clients ask until the time is up."""
    # What is asked, and when it counts
    bodies = [_predict_body(photo, load.questions) for photo in load.photos]
    start = time.perf_counter()
    count_from = start + load.warmup_seconds
    end = count_from + load.seconds
    latencies: list[list[float]] = [[] for _ in range(load.num_clients)]
    failures = [0] * load.num_clients

    # What each client does
    def be_client(number: int) -> None:
        connection = _connect(load.port)
        turn = number
        while (sent := time.perf_counter()) < end:
            connection.request("POST", "/v1/predict", bodies[turn % len(bodies)], _HEADERS)
            response = connection.getresponse()
            response.read()
            finished = time.perf_counter()
            failures[number] += response.status != 200
            if count_from <= finished <= end:
                latencies[number].append(finished - sent)
            turn += 1

    # All of them at once
    threads = [threading.Thread(target=be_client, args=(n,)) for n in range(load.num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = [seconds for own in latencies for seconds in own]
    return Answered(len(counted) / load.seconds, counted, sum(failures))


def first_word_seconds(port: int, model: str, photo: bytes, question: str) -> float:
    """Seconds from a request to the first words of the streamed answer."""
    url = f"data:image/jpeg;base64,{base64.b64encode(photo).decode()}"
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question},
    ]
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": content}]}
    connection = _connect(port)
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), _HEADERS)
    response = connection.getresponse()
    seconds = None
    while line := response.readline():
        is_words = line.startswith(b"data: {") and _words(line)
        if seconds is None and is_words:
            seconds = time.perf_counter() - start
    connection.close()
    if seconds is None:
        raise RuntimeError(f"status {response.status}, and no words")
    return seconds


_HEADERS = {"Content-Type": "application/json"}


def _connect(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=_WAIT_SECONDS)


def _predict_body(photo: bytes, questions: list[str]) -> bytes:
    image = base64.b64encode(photo).decode()
    return json.dumps({"image": image, "questions": questions}).encode()


def _words(line: bytes) -> str:
    """Words that an event of a stream brings."""
    choices = json.loads(line.removeprefix(b"data: "))["choices"]
    return choices[0]["delta"].get("content", "")
