"""A small Hugging Face Hub on loopback: the routes that `huggingface_hub` asks to find a model, list it and fetch its files.

A repository has commits, of which `main` names the last, and files; it may be private or gated. `requests` is what was asked.
"""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"


@dataclass
class Repo:
    commits: list = field(default_factory=list)  # (commit, {file: bytes}), the oldest first
    tags: dict = field(default_factory=dict)
    needs: str | None = None  # who lacks the token gets this error code: RepoNotFound or GatedRepo
    files_need: str | None = None  # the same, for files only

    def push(self, folder):
        """The files of a folder as the newest commit; -> the commit."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        told = f"{len(self.commits)}{sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())}"
        self.commits.append((hashlib.sha1(told.encode()).hexdigest(), files))
        return self.commits[-1][0]

    def at(self, revision):
        """-> commit and files, or None."""
        wanted = self.commits[-1][0] if revision == "main" else self.tags.get(revision, revision)
        return next(((commit, files) for commit, files in self.commits if commit == wanted), None)


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.requests, self.status = {}, [], None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def fetched(self):
        """Names of the files that were fetched whole or in part, in the order of the requests."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        ]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ROUTES = (
        (r"/api/models/([^/]+/[^/]+)", "info"),
        (r"/api/models/([^/]+/[^/]+)/revision/(.+)", "info"),
        (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "file"),
    )

    def do_GET(self):
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, unquote(path)))
        if self.server.status is not None:
            return self.answer(self.server.status)
        for pattern, name in self.ROUTES:
            if found := re.fullmatch(pattern, path):
                return self.of_repo(name, *map(unquote, found.groups()))
        return self.answer(404)

    do_HEAD = do_GET

    def of_repo(self, what, name, revision="main", *rest):
        repo, token = self.server.repos.get(name), self.headers.get("authorization")
        needs = repo and (repo.needs or (repo.files_need if what == "file" else None))
        if token not in (None, f"Bearer {TOKEN}"):
            return self.answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if repo is None or (needs and token is None):
            return self.answer(401, {"X-Error-Code": needs or "RepoNotFound"})
        if (found := repo.at(revision)) is None:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        return getattr(self, what)(name, *found, *rest)

    def info(self, name, commit, files):
        self.json({"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]})

    def tree(self, name, commit, files):
        self.json(
            [
                {"type": "file", "path": f, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for f, data in files.items()
            ]
        )

    def file(self, name, commit, files, path):
        if path not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data, start = files[path], 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", "")):
            start = int(found[1])
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.answer(206 if start else 200, headers, data[start:])

    def json(self, tree):
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())

    def answer(self, status, headers=None, body=b""):
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def running():
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
