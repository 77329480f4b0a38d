"""Requests to the Hugging Face Hub that end: with a time limit, and with one line for any error.

huggingface_hub reads ``HF_ENDPOINT`` when it is imported, sets no limit on most requests, and
raises errors of its own, of its HTTP library and of Python; see the documentation of its
``errors`` module. It is imported inside functions, so that commands that need no hub do not wait.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from annexe.errors import UserError

KINDS = ("model", "dataset", "space")  # of repositories
_SECONDS_OF_SILENCE = 60.0  # of a server to which something is sent
_RETRIED = (408, 429, 500, 502, 503, 504)  # states of a server that may pass


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        name: its path in the repository.
        size: in bytes.
        digest: of its content, in hexadecimal digits.
        is_large: ``digest`` is the SHA-256 that Git LFS gives to large files; other files have
            Git's own SHA-1 of a blob.
    """

    name: str
    size: int
    digest: str
    is_large: bool

    def new_hash(self) -> hashlib._Hash:
        """A hash of nothing yet, which gives `digest` once the whole content went through it."""
        if self.is_large:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


@dataclass(frozen=True)
class Repository:
    """What a repository holds at one commit.

    Attributes:
        name: such as ``user/repo``.
        kind: one of `KINDS`.
        commit: 40 hexadecimal digits.
        license: as its card names it, if it does.
        gated: whether its owners ask for a login and consent.
    """

    name: str
    kind: str
    commit: str
    license: str | None
    gated: bool
    files: tuple[RemoteFile, ...]

    @property
    def page(self) -> str:
        """Its page for people."""
        folder = "" if self.kind == "model" else f"{self.kind}s/"
        return f"{endpoint()}/{folder}{self.name}"

    def address(self, file: RemoteFile) -> str:
        """Where a file can be fetched."""
        return f"{self.page}/resolve/{self.commit}/{quote(file.name)}"


def endpoint() -> str:
    """The address of the hub: ``HF_ENDPOINT``, else the public one.

    Raises:
        UserError: for what is no address.
    """
    from huggingface_hub import constants

    address = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    try:
        parts = urlsplit(address)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_address = is_address and (parts.port or 1) > 0
    except ValueError:
        is_address = False
    if not is_address:
        raise UserError(
            f"HF_ENDPOINT is '{address}'; set it to an address such as https://huggingface.co"
        )
    return address


def has_token() -> bool:
    """Whether the user is logged in: by ``HF_TOKEN``, or a token that was saved."""
    from huggingface_hub import get_token

    return get_token() is not None


@contextmanager
def connected() -> Iterator[Any]:
    """The hub's client, all of whose requests end.

    A request without a limit gets one. Xet is off, because its transfers know neither limits nor
    the checks of ours; so is telemetry.

    Yields:
        ``huggingface_hub.HfApi``.
    """
    from huggingface_hub import HfApi, constants, get_session

    def limit(request: Any) -> None:
        seconds = dict(request.extensions.get("timeout") or {})
        for what in ("connect", "read", "write", "pool"):
            if seconds.get(what) is None:
                seconds[what] = _SECONDS_OF_SILENCE
        request.extensions["timeout"] = seconds

    # For the time of the block alone: a limit for every request, and two switches
    client = get_session()
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "request": [*hooks.get("request", []), limit]}
    switches = {}
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"):
        switches[name] = getattr(constants, name)
        setattr(constants, name, True)
    try:
        yield HfApi(endpoint=endpoint())
    finally:
        client.event_hooks = hooks
        for name, value in switches.items():
            setattr(constants, name, value)


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn everything that can go wrong with the hub into one line.

    Args:
        what: is asked for, such as ``user/repo``.

    Raises:
        UserError: naming ``what``, and the fix.
    """
    from huggingface_hub import errors

    # From the special to the general: the later ones are bases of those before
    try:
        yield
    except UserError:
        raise

    # The hub answers that it does not show this
    except errors.GatedRepoError:
        raise gated_error(what) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"'{what}' has no such revision; give a branch, tag or commit") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"the hub shows no '{what}'; check the name, and for a private one log in "
            "('hf auth login', or HF_TOKEN)"
        ) from None
    except errors.EntryNotFoundError:
        raise UserError(f"the hub has no '{what}' any more; repeat the command") from None

    # Nothing was asked or answered, or the answer is an error
    except errors.OfflineModeIsEnabled:
        raise NoConnection(
            f"'{what}' was not asked for, because HF_HUB_OFFLINE is set; unset it"
        ) from None
    except errors.HfHubHTTPError as error:
        raise UserError(f"'{what}': {_explain_state(error)}") from None
    except errors.HTTPError as error:
        raise NoConnection(
            f"cannot reach {endpoint()} for '{what}' ({_reason(error)}); "
            "check the network, the proxy and HF_ENDPOINT, then repeat"
        ) from None

    # Of the library itself: it refuses the name, or cannot read the answer
    except errors.HFValidationError:
        raise UserError(f"'{what}' is no name of a repository, such as user/repo") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{endpoint()} does not answer as the hub does for '{what}'; check HF_ENDPOINT "
            "and the proxy"
        ) from None


class NoConnection(UserError):
    """The hub could not be reached, or may not be."""


def gated_error(what: str) -> UserError:
    """The error for a repository whose owners have not let this user in."""
    repository = "/".join(what.split("/")[:2])
    if has_token():
        return UserError(
            f"'{what}' is gated, and your account has no access: accept its license at "
            f"{endpoint()}/{repository} and wait until it is granted"
        )
    return UserError(
        f"'{what}' is gated: accept its license at {endpoint()}/{repository}, then log in "
        "('hf auth login', or HF_TOKEN)"
    )


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return _state_of(error) in _RETRIED
    return isinstance(error, errors.HTTPError)


def _state_of(error: Any) -> int | None:
    """The status code of an answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _explain_state(error: Any) -> str:
    """What a status code means, and what to do."""
    state = _state_of(error)
    if state == 401:
        return "the hub does not know the token; log in anew ('hf auth login', or HF_TOKEN)"
    if state == 403:
        said = getattr(error, "server_message", None) or "forbidden"
        return f"the token has no right to this ({_first_line(said)}); take one that may write"
    if state == 429:
        return "the hub asks to come more slowly (429); log in, or repeat in some minutes"
    return f"the hub answered {state} ({_first_line(error)}); repeat in some minutes"


def _reason(error: Exception) -> str:
    """Why there was no answer, in a few words."""
    return _first_line(error) or type(error).__name__


def _first_line(text: object) -> str:
    """The beginning of a text that may have many lines."""
    lines = str(text).strip().splitlines() or [""]
    return lines[0][:160]


def list_files(name: str, kind: str = "model", revision: str | None = None) -> Repository:
    """What a repository holds, and at which commit.

    Args:
        name: such as ``user/repo``.
        kind: one of `KINDS`.
        revision: a branch, tag or commit (default: the main branch).

    Raises:
        NoConnection: if there is no answer.
        UserError: for a repository that is not there or not shown.
    """
    from huggingface_hub import constants

    with one_line(name), connected() as api:
        # One request with a short limit, before those that are tried several times
        seconds = constants.HF_HUB_ETAG_TIMEOUT
        info = api.repo_info(name, repo_type=kind, revision=revision, timeout=seconds)
        files = []
        tree = api.list_repo_tree(name, recursive=True, revision=info.sha, repo_type=kind)
        for entry in tree:
            blob = getattr(entry, "blob_id", None)
            if blob is None:
                continue  # a folder
            large = entry.lfs
            digest = blob if large is None else large.sha256
            files.append(RemoteFile(entry.path, int(entry.size), digest, large is not None))
        card = info.card_data
        license = None if card is None else card.get("license")
        gated = bool(getattr(info, "gated", False))
    return Repository(name, kind, str(info.sha), license, gated, tuple(files))
