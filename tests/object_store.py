"""An object store of a test's own: S3's ListObjectsV2, HEAD, GET with ranges and PUT over HTTP, and the same objects as a plain
web server with pages of links. It refuses, drops, goes silent and keeps a log, as a test asks.
"""

import hashlib
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 2  # keys of one answer to a list: more of them are asked for with a token


class ObjectStore:
    """`objects` by /bucket/key; `faults` strike one request each: a status, 0 for no fault, "drop" for a connection that breaks
    off in the answer's body, "silence" for no answer. `denied` paths are answered with 403."""

    def __init__(self, url: str = ""):
        self.url, self.objects, self.faults = url, dict[str, bytes](), deque[int | str]()
        self.denied, self.takes_ranges, self.log = set[str](), True, list[tuple[str, str, str | None]]()
        self.is_over = threading.Event()
        self.when_read = dict[str, bytes]()  # path -> what it becomes once it has been read from

    def clear(self) -> None:
        for kept in (self.objects, self.faults, self.denied, self.log, self.when_read):
            kept.clear()
        self.takes_ranges = True

    def put(self, path: str, data: bytes) -> None:
        self.objects[path] = data

    def keys(self, bucket: str) -> list[str]:
        return sorted(path.removeprefix(f"/{bucket}/") for path in self.objects if path.startswith(f"/{bucket}/"))

    def requests(self) -> Counter[str]:
        return Counter(method for method, _, _ in self.log)


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    store = ObjectStore()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store}))
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.is_over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients go away as they like."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: ObjectStore

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_PUT(self) -> None:
        """Take an object, whole or not at all."""
        data, path = self._body(), unquote(urlsplit(self.path).path)
        self.store.log.append((self.command, path, None))
        fault = self.store.faults.popleft() if self.store.faults else None
        if fault and isinstance(fault, int):
            self._error(fault, {503: "SlowDown", 500: "InternalError"}.get(fault, "Other"))
        elif path in self.store.denied or f"/{path.split('/')[1]}" in self.store.denied:
            self._error(403, "AccessDenied")
        else:
            self.store.objects[path] = data
            self._text(200, "text/plain", "", {"ETag": etag(data)})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        found = b""
        while num := int(self.rfile.readline(), 16):
            found += self.rfile.read(num)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _answer(self, with_body: bool) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {key: found[0] for key, found in parse_qs(parts.query).items()}
        self.store.log.append((self.command, path, self.headers.get("Range")))
        fault = self.store.faults.popleft() if self.store.faults else None
        bucket = path.strip("/").split("/")[0]
        if fault == "silence":
            self.store.is_over.wait()
        elif fault and isinstance(fault, int):
            self._error(fault, {503: "SlowDown", 500: "InternalError"}.get(fault, "Other"))
        elif path in self.store.denied or f"/{bucket}" in self.store.denied:
            self._error(403, "AccessDenied")
        elif path in self.store.objects:
            self._object(path, with_body, fault == "drop")
        elif not self.store.keys(bucket):
            self._error(404, "NoSuchBucket")
        elif path == f"/{bucket}" and self.command == "HEAD":
            self._text(200, "text/plain", "")
        elif "list-type" in query:
            self._list(bucket, query)
        elif "Authorization" not in self.headers and any(
            key.startswith(f"{path.rstrip('/')}/") for key in self.store.objects
        ):  # for who does not speak S3
            self._links(path)
        else:
            self._error(404, "NoSuchKey")

    def _object(self, path: str, with_body: bool, drops: bool) -> None:
        data, asked = self.store.objects[path], self.headers.get("Range")
        if self.headers.get("If-Match") not in (None, etag(data)):
            self._error(412, "PreconditionFailed")
            return
        if asked and self.store.takes_ranges:
            first, last = (int(each) if each else None for each in asked.removeprefix("bytes=").split("-"))
            assert first is not None
            body = data[first : None if last is None else last + 1]
            place = {"Content-Range": f"bytes {first}-{first + len(body) - 1}/{len(data)}"}
            self._send(206, body, data, place, with_body, drops)
        else:
            self._send(200, data, data, {}, with_body, drops)
        if with_body and path in self.store.when_read:
            self.store.objects[path] = self.store.when_read[path]

    def _send(
        self, status: int, body: bytes, data: bytes, headers: dict[str, str], with_body: bool, drops: bool
    ) -> None:
        self.send_response(status)
        dates = {"Last-Modified": formatdate(0, usegmt=True), "ETag": etag(data)}
        for name, value in {"Content-Length": str(len(body)), **dates, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if drops else body)
        self.close_connection = self.close_connection or drops

    def _text(self, status: int, kind: str, text: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        body = b"" if self.command == "HEAD" else text.encode()
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self._text(
            status, "application/xml", f"<Error><Code>{code}</Code><Message>{code} of the test</Message></Error>"
        )

    def _links(self, path: str) -> None:
        if not path.endswith("/"):
            self._text(301, "text/html", "", {"Location": f"{path}/"})
            return
        below = {key.removeprefix(path) for key in self.store.objects if key.startswith(path)}
        names = sorted({name.split("/")[0] + "/" * ("/" in name) for name in below})
        self._text(200, "text/html", "".join(f'<a href="{quote(name)}">{name}</a>' for name in names))

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names = [key for key in self.store.keys(bucket) if key.startswith(prefix)]
        rests = [name.removeprefix(prefix) for name in names]
        folders = {prefix + rest[: rest.index(delimiter) + 1] for rest in rests if delimiter and delimiter in rest}
        entries = sorted({*folders, *(name for name in names if not any(name.startswith(each) for each in folders))})
        begin = int(query.get("continuation-token", 0))
        most = min(PAGE, int(query.get("max-keys", PAGE)))
        shown, more = entries[begin : begin + most], begin + most < len(entries)
        token = f"<NextContinuationToken>{begin + most}</NextContinuationToken>" if more else ""
        self._text(
            200,
            "application/xml",
            f"<ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(shown)}</KeyCount>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}"
            + "".join(self._entry(bucket, name, name in folders) for name in shown)
            + "</ListBucketResult>",
        )

    def _entry(self, bucket: str, name: str, is_folder: bool) -> str:
        if is_folder:
            return f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
        data = self.store.objects[f"/{bucket}/{name}"]
        return (
            f"<Contents><Key>{escape(name)}</Key><Size>{len(data)}</Size><ETag>{escape(etag(data))}</ETag>"
            "<LastModified>1970-01-01T00:00:00.000Z</LastModified></Contents>"
        )
