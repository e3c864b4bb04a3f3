"""A hub on 127.0.0.1: the few endpoints that huggingface_hub asks when it fetches a snapshot."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """Models by id and commit, and every request that was made.

    Args:
        folder: where the published files are kept.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.revisions: dict[str, dict[str, str]] = {}  # id -> branch or commit -> commit
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.broken = False  # answers every request with 500
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def publish(self, name: str, source: Path, *, branch: str = "main") -> str:
        """Put a copy of a folder under ``name`` and let ``branch`` mean it; returns the commit."""
        digest = hashlib.sha1(str(source).encode())
        for file in sorted(source.rglob("*")):
            if file.is_file():
                digest.update(file.read_bytes())
        commit = digest.hexdigest()
        shutil.copytree(source, self.folder / name / commit, dirs_exist_ok=True)
        self.revisions.setdefault(name, {}).update({branch: commit, commit: commit})
        return commit

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = urlsplit(handler.path).path
        self.requests.append(f"{handler.command} {path}")
        _send(handler, *self._reply([unquote(part) for part in path.strip("/").split("/")]))

    def _reply(self, parts: list[str]) -> tuple[int, bytes, dict[str, str]]:
        """(code, body, headers) for api/models/ORG/NAME/revision/REV, .../tree/REV and ORG/NAME/resolve/REV/FILE."""
        parts = parts[2:] if parts[:2] == ["api", "models"] else parts
        name, (kind, revision, *file) = "/".join(parts[:2]), [*parts[2:], "", ""][: max(2, len(parts) - 2)]
        known = self.revisions.get(name)
        folder = self.folder / name / (known or {}).get(revision, "none")
        code, body, headers = 200, b"{}", {"X-Repo-Commit": folder.name}
        if self.broken:
            code = 500
        elif known is None:
            code, headers = 401, {"X-Error-Code": "RepoNotFound"}
        elif revision not in known:
            code, headers = 404, {"X-Error-Code": "RevisionNotFound"}
        elif kind == "revision":
            body = json.dumps({"id": name, "sha": folder.name, "siblings": []}).encode()
        elif name in self.gated:
            code, headers = 403, {"X-Error-Code": "GatedRepo"}
        elif kind == "tree":
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            body = json.dumps(
                [
                    {
                        "type": "file",
                        "path": p.relative_to(folder).as_posix(),
                        "size": p.stat().st_size,
                        "oid": _sha1(p),
                    }
                    for p in files
                ]
            ).encode()
        else:
            place = folder.joinpath(*file)
            body, headers = place.read_bytes(), {**headers, "ETag": f'"{_sha1(place)}"'}
        return code, body, headers


def _sha1(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _send(handler: BaseHTTPRequestHandler, code: int, body: bytes, headers: dict[str, str]) -> None:
    handler.send_response(code)
    for key, value in headers.items():
        handler.send_header(key, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub._server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub._server.shutdown()
        hub._server.server_close()
        thread.join()
