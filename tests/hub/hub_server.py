"""A Hugging Face Hub on localhost: the endpoints that huggingface_hub calls to create, upload and download.

Files of at least ``LFS_THRESHOLD`` bytes, and all safetensors, go through Git LFS (batch, PUT, verify) as on the Hub;
the rest travels inside the commit. Everything is kept in memory. ``HubServer.requests`` records what was asked, so a
test can see which header carried the token and which bytes were sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_THRESHOLD = 1_000_000
USER = "tester"


@dataclass
class Repo:
    """Branches point at commits; a commit is a mapping from path to the bytes of the file."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    pull_requests: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        digest = hashlib.sha1(f"{len(self.commits)} {message}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        oid = digest.hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class HubError(Exception):
    """An answer other than 200, in the Hub's own form."""

    def __init__(self, status: int, message: str, code: str | None = None, **payload: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.payload = status, message, code, payload


class HubServer:
    """``with HubServer({"hf_write": "write"}) as hub: ... hub.url``. Tokens map to ``"write"`` or ``"read"``."""

    def __init__(self, tokens: dict[str, str]) -> None:
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.branches[revision]]

    def paths(self, method: str) -> list[str]:
        return [request.path for request in self.requests if request.method == method]


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size >= LFS_THRESHOLD


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    # (method, pattern of the path, name of the method that answers, least role)
    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami", "read"),
        ("POST", r"/api/validate-yaml", "validate_yaml", None),
        ("POST", r"/api/repos/create", "create", "write"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)", "branch", "write"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)", "preupload", "write"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)", "commit", "write"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch", "write"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put", None),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify", "write"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/auth-check/write", "auth_check", "write"),
        ("GET", r"/api/(models|datasets)/(?P<repo>[^/]+/[^/]+)(/revision/(?P<rev>[^/]+))?", "info", None),
        ("GET", r"/api/(models|datasets)/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)/?(?P<folder>.*)", "tree", None),
        ("POST", r"/api/datasets/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<rev>[^/]+)", "paths_info", None),
        ("HEAD|GET", r"(/datasets)?/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)", "resolve_file", None),
    )

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test output quiet."""

    def handle_request(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        split = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.path, headers, body))
            try:
                for method, pattern, name, role in self.ROUTES:
                    match = re.fullmatch(pattern, split.path)
                    if match and self.command in method.split("|"):
                        groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                        self._authorise(role)
                        getattr(self, name)(body=body, query=parse_qs(split.query), **groups)
                        return
                raise HubError(404, f"no such endpoint: {self.command} {split.path}")
            except HubError as error:
                extra = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
                self._json({"error": error.message, **error.payload}, error.status, extra)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    # Endpoints

    def whoami(self, **_: Any) -> None:
        self._json({"type": "user", "name": USER, "orgs": []})

    def validate_yaml(self, body: bytes, **_: Any) -> None:
        content = json.loads(body)["content"]
        match = re.match(r"^---\n(.*?)\n---\n", content, re.DOTALL)
        if not match or not isinstance(yaml.safe_load(match[1]), dict):
            raise HubError(400, "no metadata", errors=[{"message": "the card has no YAML block"}], warnings=[])
        self._json({"errors": [], "warnings": []})

    def create(self, body: bytes, **_: Any) -> None:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if not repo_id.startswith(f"{USER}/"):
            raise HubError(403, f"You don't have the rights to create a model under the namespace {repo_id!r}")
        if repo_id in self.hub.repos:
            raise HubError(409, "You already created this model repo", url=url)
        repo = self.hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self._json({"url": url, "name": repo_id})

    def branch(self, repo: str, rev: str, **_: Any) -> None:
        found = self._repo(repo)
        if rev in found.branches:
            raise HubError(409, f"Reference already exists: {rev}")
        found.branches[rev] = found.branches["main"]
        self._json({})

    def preupload(self, repo: str, rev: str, body: bytes, **_: Any) -> None:
        files = self._commit(repo, rev)[1]
        answers = []
        for asked in json.loads(body)["files"]:
            lfs, old = is_lfs(asked["path"], asked["size"]), files.get(asked["path"])
            oid = None if old is None else hashlib.sha256(old).hexdigest() if lfs else git_oid(old)
            answer = {"path": asked["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": oid} if oid else {}))
        self._json({"files": answers})

    def lfs_batch(self, repo: str, body: bytes, **_: Any) -> None:
        self._repo(repo)
        answers = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/lfs/{asked['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            answers.append(answer)
        self._json({"transfer": "basic", "objects": answers})

    def lfs_put(self, oid: str, body: bytes, **_: Any) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "the bytes do not have the promised SHA-256")
        self.hub.objects[oid] = body
        self._json({})

    def lfs_verify(self, oid: str, body: bytes, **_: Any) -> None:
        if len(self.hub.objects.get(oid, b"")) != json.loads(body)["size"]:
            raise HubError(404, f"object {oid} was not uploaded")
        self._json({})

    def commit(self, repo: str, rev: str, body: bytes, query: dict[str, list[str]], **_: Any) -> None:
        found, files = self._repo(repo), dict(self._commit(repo, rev)[1])
        message = ""
        for line in body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(400, f"unknown operation {key!r}")
        answer: dict[str, Any] = {"success": True}
        if query.get("create_pr") == ["1"]:
            found.pull_requests.append(message)
            rev = f"refs/pr/{len(found.pull_requests)}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{len(found.pull_requests)}"
        oid = found.commit(rev, files, message)
        self._json(answer | {"commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def info(self, repo: str, rev: str = "main", **_: Any) -> None:
        oid, files = self._commit(repo, rev)
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._json({"id": repo, "sha": oid, "private": self._repo(repo).private, "siblings": siblings})

    def auth_check(self, repo: str, **_: Any) -> None:
        self._repo(repo)
        self._json({})

    def paths_info(self, repo: str, rev: str, body: bytes, **_: Any) -> None:
        self._json(self._entries(repo, rev, parse_qs(body.decode())["paths"]))

    def tree(self, repo: str, rev: str, folder: str = "", **_: Any) -> None:
        paths = [path for path in self._commit(repo, rev)[1] if path.startswith(f"{folder}/" if folder else "")]
        if folder and not paths:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        self._json(self._entries(repo, rev, paths))

    def _entries(self, repo: str, rev: str, paths: Iterable[str]) -> list[dict[str, Any]]:
        entries, files = [], self._commit(repo, rev)[1]
        for path in sorted(set(paths) & set(files)):
            content = files[path]
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if is_lfs(path, len(content)):
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return entries

    def resolve_file(self, repo: str, rev: str, file: str, **_: Any) -> None:
        oid, files = self._commit(repo, rev)
        if file not in files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        content = files[file]
        etag = hashlib.sha256(content).hexdigest() if is_lfs(file, len(content)) else git_oid(content)
        self._send(
            200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Content-Type": "application/octet-stream"}
        )

    # Plumbing

    def _role(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        role = self.hub.tokens.get(header.removeprefix("Bearer "))
        if role is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return role

    def _authorise(self, least: str | None) -> None:
        role = self._role()
        if least is None:
            return
        if role is None:
            raise HubError(401, "Invalid username or password.")
        if least == "write" and role != "write":
            raise HubError(403, "You have read access but not the required permissions for this operation")

    def _repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self._role() is None):
            raise HubError(404 if self._role() else 401, "Repository not found", "RepoNotFound")
        return repo

    def _commit(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(repo_id)
        oid = repo.resolve(revision)
        if oid is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repo.commits[oid]

    def _json(self, payload: Any, status: int = 200, extra: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(payload).encode(), {"Content-Type": "application/json"} | (extra or {}))

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)
