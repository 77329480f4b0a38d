"""A server from its start to its end."""

from __future__ import annotations

import os
import signal
import socket
from functools import partial
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI

from annexe.errors import UserError
from annexe.inference.server.engine import MakeWorker
from annexe.inference.server.worker import LoadPredictor, ProcessWorker, ThreadWorker
from annexe.workers import num_cores

_GRACE = 5  # seconds to end beside those that a request may take
_BACKLOG = 2048  # connections that the system holds until they are accepted


def worker_makers(load: LoadPredictor, num_gpus: int) -> list[MakeWorker]:
    """What makes the workers of a server: one for a CPU, or one a GPU.

    Args:
        load: makes the predictor of a worker.
        num_gpus: 0 for a CPU.

    Raises:
        UserError: there are fewer GPUs.
    """
    if num_gpus == 0:
        return [partial(ThreadWorker, load)]
    num_there = torch.cuda.device_count()
    if num_gpus > num_there:
        raise UserError(f"--gpus is {num_gpus}, but torch sees {num_there}; ask for fewer")

    # Each process sees one GPU, and has its part of the cores
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_there)))
    names = visible.split(",")
    num_threads = max(1, num_cores() // num_gpus)
    makers: list[MakeWorker] = []
    for index in range(num_gpus):
        environment = {"CUDA_VISIBLE_DEVICES": names[index].strip()}
        if num_gpus > 1 and not os.environ.get("OMP_NUM_THREADS"):
            environment["OMP_NUM_THREADS"] = str(num_threads)
        makers.append(partial(ProcessWorker, load, environment=environment))
    return makers


def bind(host: str, port: int) -> socket.socket:
    """A socket for a server, which does not listen yet.

    Args:
        host: name or address.
        port: 0 for one that is free.

    Raises:
        UserError: the address is in use, or not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot listen on {host}, port {port} ({reason}); choose another --host or --port"
        ) from None
    return bound


def run_server(app: FastAPI, bound: socket.socket, timeout: float) -> None:
    """Answer requests until SIGTERM or SIGINT; what is under way then is finished.

    Args:
        app: the API.
        bound: where clients come.
        timeout: seconds that a request may take.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        backlog=_BACKLOG,
        timeout_graceful_shutdown=int(timeout) + _GRACE,
    )
    server = uvicorn.Server(config)

    def ignore(_: int, __: FrameType | None) -> None:
        """uvicorn raises the signal again once it has ended well: that is no failure."""

    before = {number: signal.signal(number, ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
