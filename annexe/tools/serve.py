"""`annexe serve`: a trained model behind HTTP, for programs and, with `--page`, for browsers."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from functools import partial
from typing import Any

from annexe.checkpoints.run_folder import run_of
from annexe.errors import UserError
from annexe.inference.server.extra import require_extra
from annexe.inference.server.limits import Limits
from annexe.terminal import say

_TOKEN = "ANNEXE_API_KEY"
_LIMITS = {
    "max_body_mb": "size of a request, in MB",
    "max_pixels": "pixels of a photo",
    "max_questions": "questions about a photo in one request",
    "queue": "requests that wait; more get 429",
    "timeout": "seconds until a request is given up",
}


_EXAMPLES = """\
example:
  annexe serve runs/demo --page
      a server on port 8000, with the page for browsers at http://127.0.0.1:8000

It runs until it is interrupted, and writes no files.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "run_folder",
        metavar="RUN",
        type=os.path.expanduser,
        help="run folder, or one of its checkpoints, or user/repo of one on the hub",
    )

    # Where
    parser.add_argument("--host", default="127.0.0.1", help="address (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port (default %(default)s)")
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="GPUs, each with the whole model; 0 for the CPU (default: 1 if there is one)",
    )

    # What
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="photos that go through the model together (default %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="tokens of an analysis or answer (default: the run's)",
    )
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument(
        "--compile", action="store_true", help="compile the model, which takes minutes"
    )
    parser.add_argument(
        "--model-name", metavar="NAME", help="for clients (default: name of the run folder)"
    )
    parser.add_argument(
        "--allow-urls",
        action="store_true",
        help="fetch photos that are given as addresses; the server then opens connections for "
        "its clients, also to machines that only it reaches",
    )
    parser.add_argument("--page", action="store_true", help="show a page for browsers at /")
    for field in fields(Limits):
        default: Any = field.default
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(default),
            default=default,
            metavar="N",
            help=f"{_LIMITS[field.name]} (default %(default)s)",
        )
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="A.B=C",
        help="settings put over those of the run, such as model.presence_threshold=0.3",
    )


def run(arguments: argparse.Namespace) -> None:
    """Load the model, and answer until the process is told to stop.

    Raises:
        UserError: for wrong arguments, a model that cannot be loaded, and a missing extra.
    """
    limits = Limits(**{field.name: getattr(arguments, field.name) for field in fields(Limits)})
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size is {arguments.batch_size}; it must be at least 1")
    if not 0 <= arguments.port < 2**16:
        raise UserError(f"--port is {arguments.port}; it must be between 0 and 65535")
    token = os.environ.get(_TOKEN) or None
    require_extra()

    # Imported here, because the extra may be missing
    import torch

    from annexe.inference.page import mount
    from annexe.inference.predictor import Predictor, inference_config
    from annexe.inference.server.app import Settings, make_app
    from annexe.inference.server.engine import Engine
    from annexe.inference.server.lifecycle import bind, run_server, worker_makers
    from annexe.inference.server.metrics import Metrics

    # Mistakes are told before anything takes long
    num_gpus = arguments.gpus
    if num_gpus is None:
        num_gpus = min(1, torch.cuda.device_count())
    if num_gpus < 0:
        raise UserError(f"--gpus is {num_gpus}; it must be 0 or more")
    how = {
        "device": "cuda" if num_gpus else "cpu",
        "dtype": arguments.dtype,
        "compile": arguments.compile,
        "batch_size": arguments.batch_size,
        "options": tuple(arguments.options),
    }
    _, checkpoint = inference_config(arguments.run_folder, **how)
    load = partial(
        Predictor.from_run, str(checkpoint), max_new_tokens=arguments.max_new_tokens, **how
    )
    metrics = Metrics()
    engine = Engine(
        worker_makers(load, num_gpus),
        limits,
        on_batch=metrics.on_batch,
        on_death=metrics.deaths.inc,
    )
    metrics.watch(engine)
    run_folder = run_of(checkpoint)
    settings = Settings(
        model_name=arguments.model_name or run_folder.resolve().name,
        limits=limits,
        token=token,
        allow_urls=arguments.allow_urls,
        has_page=arguments.page,
    )
    with bind(arguments.host, arguments.port) as bound:
        try:
            engine.start()
            app = make_app(engine, settings, metrics)
            if arguments.page:
                app = mount(app, engine.ask, engine.about)
            host, port = bound.getsockname()[:2]
            if host not in ("127.0.0.1", "::1") and token is None:
                say(f"anybody who reaches {host} may ask; set {_TOKEN} to a token of the clients")
            say(f"'{settings.model_name}' answers at http://{_shown(host)}:{port}")
            run_server(app, bound, limits.timeout)
        finally:
            engine.stop()
    say("stopped")


def _shown(host: str) -> str:
    """A host as it stands in an address."""
    return f"[{host}]" if ":" in host else host
