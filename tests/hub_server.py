"""A Hugging Face Hub on this machine: the requests that annexe makes, answered as the hub does.

It also has the faults of networks and servers, which a test switches on.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

_LARGE = 2000  # bytes from which a file belongs to LFS
_CHUNK = 1 << 18  # bytes that are sent at once
_PAGE = 4  # entries of a page of a tree


@dataclass
class Repo:
    """A repository: its files, and who may have them."""

    files: dict[str, bytes] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    license: str | None = None

    @property
    def commit(self) -> str:
        state = hashlib.sha1()
        for name in sorted(self.files):
            state.update(name.encode() + hashlib.sha1(self.files[name]).digest())
        return state.hexdigest()


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        break_after: bodies of files end after so many bytes,
        num_breaks: for so many of the next requests,
        break_in: for files whose names begin like this.
        seconds_per_mb: that bodies take.
        elsewhere: large files are at another address, to which the hub sends.
        silent: nothing is answered, to any request.
        spoil: a byte of every body is another one.
        status: of every answer.
        ignore_range: bodies always begin at the beginning.
        not_the_hub: all answers are a web page.
    """

    break_after: int | None = None
    num_breaks: int = 0
    break_in: str = ""
    seconds_per_mb: float = 0
    elsewhere: bool = False
    silent: bool = False
    spoil: bool = False
    status: int | None = None
    ignore_range: bool = False
    not_the_hub: bool = False


class Hub:
    """The state of the server, and what was asked of it."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults = Faults()
        self.token = "hf_right"
        self.uploads: dict[str, bytes] = {}
        self.num_bytes = 0  # of files that were sent
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.tokens_elsewhere: list[str | None] = []
        self.address = ""
        self.wakes = threading.Event()

    def add(self, name: str, files: dict[str, bytes], kind: str = "model", **how: Any) -> Repo:
        """Make a repository."""
        self.repos[kind, name] = Repo(dict(files), **how)
        return self.repos[kind, name]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers at its ``address`` as long as the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(hub))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.wakes.set()
        server.shutdown()
        server.server_close()


def _handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    """The handler of requests to one hub."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # of a client that was killed
                super().handle()

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def _answer(self) -> None:
            # Faults of the whole server
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            hub.requests.append(f"{self.command} {self.path}")
            faults = hub.faults
            if faults.silent:
                hub.wakes.wait(20)
                self.close_connection = True
                return
            if faults.not_the_hub:
                self._send(200, b"<!DOCTYPE html><html>please log in</html>", "text/html")
                return
            if faults.status is not None:
                self._send_json({"error": "out of order"}, faults.status)
                return

            path = unquote(urlparse(self.path).path)
            if path.startswith("/lfs/"):
                hub.uploads[path.removeprefix("/lfs/")] = body
                self._send(200, b"")
            elif path.startswith("/api/"):
                self._api(path.removeprefix("/api/"), body)
            elif path.endswith("/info/lfs/objects/batch"):
                self._batch(json.loads(body))
            elif path.startswith("/elsewhere/"):
                hub.tokens_elsewhere.append(self.headers.get("Authorization"))
                self._send_file("", hub.uploads[path.removeprefix("/elsewhere/")])
            elif "/resolve/" in path:
                self._file(path)
            else:
                self._send_json({"error": "no such address"}, 404)

        # What repositories are and hold

        def _find(self, kind: str, name: str) -> Repo | None:
            """A repository that this user may see; else the answer is sent."""
            repo = hub.repos.get((kind, name))
            if repo is not None and not (repo.private and not self._is_known()):
                return repo
            status = 404 if self._is_known() else 401
            self._send_json({"error": "not found"}, status, {"X-Error-Code": "RepoNotFound"})
            return None

        def _is_known(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {hub.token}"

        def _api(self, path: str, body: bytes) -> None:
            if path == "validate-yaml":
                self._send_json({"errors": [], "warnings": []})
                return
            if path == "repos/create":
                self._create(json.loads(body))
                return
            kinds, user, repo_name, *rest = path.split("/")
            name = f"{user}/{repo_name}"
            repo = self._find(kinds.removesuffix("s"), name)
            if repo is None:
                return
            action = rest[0] if rest else "revision"
            if action == "revision":
                self._info(name, repo, rest[1] if len(rest) > 1 else "main")
            elif action == "tree":
                self._tree(repo)
            elif not self._is_known():
                self._send_json({"error": "log in"}, 401)
            elif action == "preupload":
                self._preupload(json.loads(body))
            elif action == "commit":
                self._commit(name, repo, body)
            else:
                self._send_json({"error": "no such action"}, 404)

        def _info(self, name: str, repo: Repo, revision: str) -> None:
            if revision not in ("main", repo.commit):
                code = {"X-Error-Code": "RevisionNotFound"}
                self._send_json({"error": "no such revision"}, 404, code)
                return
            card = None if repo.license is None else {"license": repo.license}
            siblings = [{"rfilename": each} for each in repo.files]
            self._send_json(
                {
                    "id": name,
                    "sha": repo.commit,
                    "private": repo.private,
                    "gated": "manual" if repo.gated else False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "cardData": card,
                    "siblings": siblings,
                }
            )

        def _tree(self, repo: Repo) -> None:
            start = int(parse_qs(urlparse(self.path).query).get("start", ["0"])[0])
            names = sorted(repo.files)
            entries = []
            for name in names[start : start + _PAGE]:
                content = repo.files[name]
                entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
                entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                if len(content) >= _LARGE:
                    digest = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
                entries.append(entry)
            headers = {}
            if start + _PAGE < len(names):
                page = urlparse(self.path).path
                target = f"{hub.address}{page}?recursive=true&start={start + _PAGE}"
                headers["Link"] = f'<{target}>; rel="next"'
            self._send_json(entries, 200, headers)

        def _file(self, path: str) -> None:
            """A file, or what a range leaves of it, and the faults on the way."""
            kind = "model"
            for other in ("dataset", "space"):
                if path.startswith(f"/{other}s/"):
                    kind = other
                    path = path.removeprefix(f"/{other}s")
            name, _, rest = path.removeprefix("/").partition("/resolve/")
            repo = self._find(kind, name)
            if repo is None:
                return
            if repo.gated and not self._is_known():
                self._send_json({"error": "gated"}, 401, {"X-Error-Code": "GatedRepo"})
                return
            file_name = rest.partition("/")[2]
            if file_name not in repo.files:
                self._send_json({"error": "gone"}, 404, {"X-Error-Code": "EntryNotFound"})
                return

            content = repo.files[file_name]
            if hub.faults.elsewhere and len(content) >= _LARGE:
                digest = hashlib.sha256(content).hexdigest()
                hub.uploads[digest] = content
                address = hub.address.replace("127.0.0.1", "localhost")
                self._send(302, b"", headers={"Location": f"{address}/elsewhere/{digest}"})
                return
            self._send_file(file_name, content)

        def _send_file(self, name: str, content: bytes) -> None:
            """What is asked of a file."""
            start = 0
            asked = self.headers.get("Range")
            if asked is not None:
                hub.ranges.append(asked)
            if asked is not None and not hub.faults.ignore_range:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
            self._send_content(name, content, start)

        def _send_content(self, name: str, content: bytes, start: int) -> None:
            faults = hub.faults
            body = content[start:]
            if faults.spoil and body:
                body = bytes([body[0] ^ 1]) + body[1:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            is_broken = faults.break_after is not None and name.startswith(faults.break_in)
            if is_broken and faults.num_breaks > 0:
                faults.num_breaks -= 1
                body = body[: faults.break_after]
                self.close_connection = True
            for first in range(0, len(body), _CHUNK):
                chunk = body[first : first + _CHUNK]
                time.sleep(faults.seconds_per_mb * len(chunk) / 1e6)
                self.wfile.write(chunk)
                self.wfile.flush()
                hub.num_bytes += len(chunk)

        # Uploads

        def _create(self, asked: dict[str, Any]) -> None:
            if not self._is_known():
                self._send_json({"error": "log in"}, 401)
                return
            user = asked.get("organization") or "user"
            name = asked["name"] if "/" in asked["name"] else f"{user}/{asked['name']}"
            if ("model", name) in hub.repos:
                self._send_json({"error": "exists", "url": f"{hub.address}/{name}"}, 409)
                return
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            hub.add(name, {}, private=private)
            self._send_json({"url": f"{hub.address}/{name}", "name": name, "id": name})

        def _preupload(self, asked: dict[str, Any]) -> None:
            files = []
            for file in asked["files"]:
                mode = "lfs" if file["size"] >= _LARGE else "regular"
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            self._send_json({"files": files})

        def _batch(self, asked: dict[str, Any]) -> None:
            objects = []
            for each in asked["objects"]:
                actions = {"upload": {"href": f"{hub.address}/lfs/{each['oid']}"}}
                objects.append({**each, "actions": actions})
            self._send_json({"transfer": "basic", "objects": objects})

        def _commit(self, name: str, repo: Repo, body: bytes) -> None:
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    repo.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    repo.files[value["path"]] = hub.uploads[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del repo.files[value["path"]]
            url = f"{hub.address}/{name}/commit/{repo.commit}"
            self._send_json({"success": True, "commitOid": repo.commit, "commitUrl": url})

        # Answers

        def _send_json(
            self, value: Any, status: int = 200, headers: dict[str, str] | None = None
        ) -> None:
            self._send(status, json.dumps(value).encode(), "application/json", headers)

        def _send(
            self,
            status: int,
            body: bytes,
            content_type: str = "text/plain",
            headers: dict[str, str] | None = None,
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler
