"""A hub on this machine: a local HTTP server with the part of the protocol that the hub's client uses."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MAIN = "main"


@dataclass
class Repository:
    """`files`: of each commit, by name. The last commit is the branch main. `tags`: names of commits."""

    private: bool = False
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str | None:
        found = self.tags.get(revision, list(self.files)[-1] if revision == MAIN and self.files else revision)
        return found if found in self.files else None


class Hub(ThreadingHTTPServer):
    """`repositories`: by name. `token`: what writing needs, and reading of private repositories. `objects`: large files
    by SHA-256. `requests`: method and path. `fail`: statuses of answers by a part of the path, each for one request;
    0 closes the connection in the middle of a file. `silent`: each request ends the connection without an answer."""

    def __init__(self, token: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _RequestHandler)
        self.repositories: dict[str, Repository] = {}
        self.token = token
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.fail: dict[str, int] = {}
        self.silent = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, folders: dict[str, Path], tags: dict[str, str]) -> None:
        """A public repository with the files of a folder for each commit."""
        files = {commit: {p.name: p.read_bytes() for p in folder.iterdir()} for commit, folder in folders.items()}
        self.repositories[name] = Repository(files=files, tags=tags)

    def files_requested(self, name: str) -> list[tuple[str, str]]:
        """Revisions and files of a repository that were asked for."""
        found = (re.fullmatch(rf"/{name}/resolve/([^/]+)/(.+)", path) for _, path in self.requests)
        return [(match[1], match[2]) for match in found if match]


class _RequestHandler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def log_message(self, *_: object) -> None:
        pass

    def _route(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.command, self.path))
        if self.server.silent:
            self.close_connection = True
            return
        for part in [part for part, status in self.server.fail.items() if part in self.path and status]:
            self._answer(self.server.fail.pop(part))
            return
        for pattern, handle in (
            (r"/api/validate-yaml", self._validate),
            (r"/api/repos/create", self._create),
            (r"/objects/(\w+)", self._store),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/api/models/([^/]+/[^/]+)/preupload/main", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/main", self._commit),
            (r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/?]+))?(?:\?.*)?", self._info),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
        ):
            if match := re.fullmatch(pattern, self.path):
                handle(*match.groups())
                return
        self._answer(404)

    def _validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self._may_write():
            return
        if name in self.server.repositories:
            self._json({"url": f"{self.server.url}/{name}"}, 409)
            return
        self.server.repositories[name] = Repository(private=asked.get("private", False))
        self._json({"url": f"{self.server.url}/{name}"})

    def _preupload(self, name: str) -> None:
        files = json.loads(self.body)["files"]
        modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in files}
        answers = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self._json({"files": answers})

    def _batch(self, name: str) -> None:
        objects: list[dict[str, Any]] = json.loads(self.body)["objects"]
        for each in objects:
            if each["oid"] not in self.server.objects:
                each["actions"] = {"upload": {"href": f"{self.server.url}/objects/{each['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, sha256: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == sha256
        self.server.objects[sha256] = self.body
        self._answer(200)

    def _commit(self, name: str) -> None:
        if not self._may_write():
            return
        repository, changed = self.server.repositories[name], {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.server.objects[value["oid"]]
        commit = hashlib.sha1(self.body).hexdigest()
        last = list(repository.files.values())[-1] if repository.files else {}
        repository.files[commit] = {**last, **changed}
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"})

    def _info(self, name: str, revision: str | None) -> None:
        repository = self._readable(name)
        if repository is None:
            return
        commit = repository.commit_of(revision or MAIN)
        if commit is None and revision:
            self._answer(404, "RevisionNotFound")
            return
        siblings = [{"rfilename": file} for file in repository.files.get(commit or "", {})]
        self._json({"id": name, "sha": commit, "private": repository.private, "siblings": siblings})

    def _file(self, name: str, revision: str, file: str) -> None:
        repository = self._readable(name)
        if repository is None:
            return
        commit = repository.commit_of(revision)
        data = repository.files[commit].get(file) if commit else None
        if data is None:
            self._answer(404, "EntryNotFound" if commit else "RevisionNotFound")
            return
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"X-Repo-Commit": commit or "", "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if self.command == "GET" and self.server.fail.pop(file, None) == 0:
            self._answer(200, data=data[: len(data) // 2], length=len(data), **headers)
            self.close_connection = True
            return
        self._answer(206 if start else 200, data=data[start:], **headers)

    def _readable(self, name: str) -> Repository | None:
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self._has_token()):
            self._answer(404, "RepoNotFound")
            return None
        return repository

    def _may_write(self) -> bool:
        if not self._has_token():
            self._answer(401)
        return self._has_token()

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(status, data=json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _answer(
        self, status: int, code: str = "", data: bytes = b"", length: int | None = None, **headers: str
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, **({"X-Error-Code": code} if code else {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
