"""A stand-in for the Hugging Face Hub: as much of its HTTP API as the real client needs to push and load models.

Repositories live in memory. Tokens say what their owner may do: "write", or "read" only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


class Repository:
    def __init__(self, private: bool):
        self.private = private
        self.branches: dict[str, str] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, bytes], deleted: Collection[str] = ()) -> str:
        tree = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        tree = {name: content for name, content in tree.items() if name not in deleted}
        oid = hashlib.sha1(f"{branch}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = tree, oid
        return oid

    def resolve(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None


class Hub:
    """The server; `url` once started. `requests` holds (method, path, status)."""

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS
        self.stopped = False
        self.requests: list[tuple[str, str, int]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def start(self) -> None:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Refuse new connections and drop those that are open."""
        self.stopped = True
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.branches[branch]]


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing on standard error."""

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if self.hub.stopped:
            self.close_connection = True
            return
        path = unquote(urlsplit(self.path).path)
        try:
            self._route(path)
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self._answer({"error": refused.message}, refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _route(self, path: str) -> None:
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self._create()
        if path == "/api/validate-yaml":
            return self._answer({"warnings": [], "errors": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._lfs_batch("/".join(parts[:2]).removesuffix(".git"))
        if parts[0] == "lfs":
            return self._lfs_object(parts[1])
        if parts[0] == "api" and parts[1] == "models":
            repo_id, rest = "/".join(parts[2:4]), parts[4:]
            action: dict[str, Callable[..., None]] = {
                "preupload": self._preupload, "commit": self._commit, "revision": self._info, "tree": self._tree,
                "branch": self._branch,
            }  # fmt: skip
            if not rest:
                return self._info(repo_id, "main")
            if rest[0] in action:
                return action[rest[0]](repo_id, *rest[1:])
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        raise _Refused(404, f"no such route: {path}")

    # -------------------------------------------------------------------------------------------------------- routes

    def _create(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        self._must_write()
        if repo_id in self.hub.repositories:
            return self._answer({"error": "exists", "url": f"{self.hub.url}/{repo_id}"}, 409)
        self.hub.repositories[repo_id] = Repository(wanted.get("visibility") == "private")
        self._answer({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def _info(self, repo_id: str, revision: str) -> None:
        repository, oid = self._readable(repo_id, revision)
        files = repository.commits[oid]
        card = files.get("README.md", b"").decode().split("---\n")
        self._answer({
            "_id": "0" * 24, "id": repo_id, "modelId": repo_id, "sha": oid, "private": repository.private,
            "siblings": [{"rfilename": name} for name in files], "tags": [], "downloads": 0, "likes": 0,
            "cardData": yaml.safe_load(card[1]) if len(card) > 2 else None,
        })  # fmt: skip

    def _tree(self, repo_id: str, revision: str, *folder: str) -> None:
        repository, oid = self._readable(repo_id, revision)
        prefix = "".join(f"{part}/" for part in folder)
        files = {name: data for name, data in repository.commits[oid].items() if name.startswith(prefix)}
        if folder and not files:
            raise _Refused(404, f"no folder {prefix}", "EntryNotFound")
        entries = [
            {"type": "file", "oid": _sha1(data), "size": len(data), "path": name} for name, data in files.items()
        ]
        self._answer(entries)

    def _branch(self, repo_id: str, branch: str) -> None:
        self._must_write()
        repository, oid = self._readable(repo_id, "main")
        if branch in repository.branches:
            raise _Refused(409, "branch exists")
        repository.branches[branch] = oid
        self._answer({})

    def _preupload(self, repo_id: str, revision: str) -> None:
        self._must_write()
        repository, oid = self._readable(repo_id, revision)
        present = repository.commits[oid]
        self._answer({"files": [
            {
                "path": file["path"], "shouldIgnore": False,
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "oid": _sha1(present[file["path"]]) if file["path"] in present else None,
            }
            for file in json.loads(self.body)["files"]
        ]})  # fmt: skip

    def _lfs_batch(self, repo_id: str) -> None:
        self._must_write()
        self._readable(repo_id, "main")
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            known = wanted["oid"] in self.hub.objects
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append({**wanted} if known else {**wanted, "actions": upload})
        self._answer({"transfer": "basic", "objects": objects})

    def _lfs_object(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "content and oid differ")
        self.hub.objects[oid] = self.body
        self._answer({})

    def _commit(self, repo_id: str, revision: str) -> None:
        self._must_write()
        repository, _ = self._readable(repo_id, revision)
        files, deleted = {}, []
        for line in self.body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.hub.objects[entry["value"]["oid"]]
            elif entry["key"] == "deletedFile":
                deleted.append(entry["value"]["path"])
        oid = repository.commit(revision, files, deleted)
        self._answer({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid, "success": True})

    def _file(self, repo_id: str, revision: str, name: str) -> None:
        repository, oid = self._readable(repo_id, revision)
        content = repository.commits[oid].get(name)
        headers = {"X-Repo-Commit": oid}
        if content is None:
            raise _Refused(404, f"no file {name}", "EntryNotFound")
        self._send(content, 200, {**headers, "ETag": f'"{_sha1(content)}"', "Accept-Ranges": "none"})

    # ------------------------------------------------------------------------------------------------------- helpers

    def _may(self) -> str | None:
        return self.hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _must_write(self) -> None:
        if self._may() is None:
            raise _Refused(401, "Invalid username or password.")
        if self._may() != "write":
            raise _Refused(403, "You don't have the rights to create a model under this namespace.")

    def _readable(self, repo_id: str, revision: str) -> tuple[Repository, str]:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self._may() is None):
            raise _Refused(404 if self._may() else 401, "Repository not found", "RepoNotFound")
        oid = repository.resolve(revision)
        if oid is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, oid

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
