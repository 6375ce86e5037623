"""A hub on this machine, over HTTP."""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


class _HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """The client has gone: that is what is tested."""


@contextmanager
def hub_at(handler: type[BaseHTTPRequestHandler], cache: Path, patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its address, which huggingface_hub asks in this process, with a cache of its own."""
    from huggingface_hub import close_session

    server = _HubServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": address,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        patch.setattr(f"huggingface_hub.constants.{name}", value)
    patch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield address
    server.shutdown()
    server.server_close()
    close_session()


TOKEN = "hf_a-secret"


LARGE = (".safetensors", ".bin")  # what goes through LFS


class Repo:
    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.heads: dict[str, str] = {}
        self.told: list[dict[str, Any]] = []  # the head of each commit, as it was asked for
        self.add("main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def add(self, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        self.heads[branch] = oid
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.heads.get(revision, revision))


class Hub:
    """`fails` says how a request with these words in its path ends: a status, or "leaves"."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.fails: dict[str, int | str] = {}
        self.asked: list[str] = []
        self.address = self.spoil = ""  # `spoil` is a file that it keeps other than it came
        self.on: Callable[[str], None] = lambda _: None

    def put(self, files: dict[str, bytes] | None = None, *, private: bool = False) -> Repo:
        repo = self.repos["org/name"] = Repo(private)
        repo.add("main", {**(repo.files() or {}), **(files or {})})
        return repo

    def writes(self) -> list[str]:
        return [asked for asked in self.asked if not asked.startswith(("GET", "HEAD"))]


def entry(path: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob}
    if path.endswith(LARGE):
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        found |= {"lfs": lfs, "oid": "f" * 40}
    return found


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def answer(self, status: int, value: Any = None, **headers: str) -> None:
        data = value if isinstance(value, bytes) else b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        names = {"Content-Length": str(len(data)), "Content-Type": "application/json"} | {
            key.replace("_", "-"): text for key, text in headers.items()
        }
        for key, text in names.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        self.hub.on(path)
        how = next((how for words, how in self.hub.fails.items() if words in path), None)
        if how == "leaves":
            self.close_connection = True
        elif how is not None:
            self.answer(int(how), None, X_Error_Message="so it is")
        elif path.startswith("/lfs/"):
            self.hub.objects[path[5:]] = body
            self.answer(200)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, None, X_Error_Message="Invalid credentials in Authorization header")
        elif path == "/api/validate-yaml":
            self.answer(200, {"warnings": [{"message": "a remark"}], "errors": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            self.hub.repos["org/name"] = Repo(asked.get("visibility") == "private")
            self.answer(200, {"url": f"{self.hub.address}/org/name"})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.answer(
                200, {"transfer": "basic", "objects": [*map(self.upload, json.loads(body)["objects"])]}
            )
        elif (repo := self.hub.repos.get("org/name")) is None:
            self.answer(404, None, X_Error_Code="RepoNotFound")
        elif "/resolve/" in path:
            self.resolve(repo, *path.partition("/resolve/")[2].split("/", 1))
        else:
            self.api(repo, *path.removeprefix("/api/models/org/name").lstrip("/").partition("/")[::2], body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.hub.objects:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{wanted['oid']}"}}}

    def api(self, repo: Repo, what: str, revision: str, body: bytes) -> None:
        files = repo.files(revision or "main")
        if what == "branch":
            repo.heads[revision] = repo.heads["main"]
            self.answer(200)
        elif files is None:
            self.answer(404, None, X_Error_Code="RevisionNotFound")
        elif what in ("", "revision"):
            sha = repo.heads.get(revision or "main", revision)
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            self.answer(200, {"id": "org/name", "sha": sha, "private": repo.private, "siblings": siblings})
        elif what == "tree":
            self.answer(200, [entry(*item) for item in files.items()])
        elif what == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer(200, {"files": [self.mode(name, files.get(name)) for name in names]})
        elif what == "commit":
            self.commit(repo, revision, files, [json.loads(line) for line in body.splitlines()])

    def mode(self, name: str, data: bytes | None) -> dict[str, Any]:
        here = None if data is None else entry(name, data)
        oid = here and here.get("lfs", here)["oid"]
        mode = "lfs" if name.endswith(LARGE) else "regular"
        return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def commit(self, repo: Repo, branch: str, files: dict[str, bytes], lines: list[Any]) -> None:
        files = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.told.append(value)
                if value["parentCommit"] != repo.heads[branch]:
                    return self.answer(412, None, X_Error_Message="A commit has happened since")
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        if self.hub.spoil:
            files[self.hub.spoil] = files[self.hub.spoil][:-1] + b"?"
        pull = "create_pr=1" in self.path
        oid = repo.add("refs/pr/7" if pull else branch, files)
        answer = {"commitUrl": f"{self.hub.address}/org/name/commit/{oid}", "commitOid": oid}
        self.answer(200, answer | {"pullRequestUrl": f"{self.hub.address}/org/name/discussions/7"})

    def resolve(self, repo: Repo, revision: str, name: str) -> None:
        data = (repo.files(revision) or {}).get(name)
        if data is None:
            return self.answer(404, None, X_Error_Code="EntryNotFound")
        etag = hashlib.sha256(data).hexdigest()
        self.answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=repo.heads.get(revision, revision))

    def log_message(self, *_: Any) -> None:
        pass
