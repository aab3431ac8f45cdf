"""Files at addresses (s3://, gs://, hf://, https://, memory://), listed, read and written through fsspec.

Decisions. Keys, endpoints and proxies are found where each store's own client looks for them (its environment variables and
files), and are in no settings of ours. A file is what it was when it was listed: size and mark (its hash, where the store says
one, else its date), compared whenever something goes wrong. It is read by ranges, each asked for again until PATIENCE_S have
passed; from a server without ranges it is copied into a temporary file first. Nothing is held in memory but BLOCK_BYTES.
"""

import functools
import io
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast
from uuid import uuid4

from trinity.errors import DataError, TrinityError, Unavailable
from trinity.utils.trying import retrying, tried

BLOCK_BYTES = 4 << 20
PATIENCE_S, SILENCE_S = 60.0, 20.0  # until we give up asking; until one question is given up
MARKS = (  # what stores call the hash of a file, then its date; the first that is there
    "ETag", "etag", "md5Hash", "md5", "Content-MD5", "blob_id", "sha256", "generation",
    "LastModified", "Last-Modified", "last_modified", "updated", "mtime", "modified", "created",
)  # fmt: skip
LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError, TypeError)
CLIENTS = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}  # others: our extra
T = TypeVar("T")


@dataclass(frozen=True, order=True)
class RemoteFile:
    """A file at an address, as it was listed. Has of `pathlib.Path` what readers ask for."""

    address: str
    size: int | None
    mark: str

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        return PurePosixPath(_without_query(self.address)).name

    @property
    def suffixes(self) -> list[str]:
        return PurePosixPath(self.name).suffixes

    @property
    def stamp(self) -> list[Any]:
        """Tells whether it has changed."""
        return [self.address, self.size, self.mark]

    def relative_to(self, root: object) -> PurePosixPath:
        """Its path below that address."""
        return PurePosixPath(self.address.removeprefix(str(root)).lstrip("/"))

    def inside(self, name: str) -> "RemoteFile":
        """Name what lies in it, for messages."""
        return replace(self, address=f"{self.address}/{name}")

    def open(self, mode: str = "rb", buffering: int = -1) -> BinaryIO:
        """Open it for reading, from any place. Reads raise DataError, and Unavailable when the store does not answer."""
        assert mode == "rb", "files at addresses are read"
        reads_ranges = self.size is not None and asked(self.address, functools.partial(_reads_ranges, self.address))
        if not reads_ranges:
            return asked(self.address, self._copied)
        return cast(BinaryIO, io.BufferedReader(_Ranges(self), BLOCK_BYTES if buffering < 0 else buffering))

    def require_unchanged(self) -> None:
        """Raise DataError unless it still is what it was when it was listed."""
        system, path = _system(self.address)
        system.invalidate_cache()
        now = _file(system, path, asked(self.address, functools.partial(system.info, path)))
        if now != self:
            raise DataError(f"{self.address} has changed since it was listed; start again when nobody writes to it")

    def _copied(self) -> BinaryIO:
        system, path = _system(self.address)
        copy = cast(BinaryIO, tempfile.TemporaryFile(prefix="trinity-"))  # noqa: SIM115  # its reader closes it
        with system.open(path, "rb", block_size=0) as stream:
            shutil.copyfileobj(stream, copy, BLOCK_BYTES)
        if self.size is not None and copy.tell() != self.size:
            raise OSError(f"gave {copy.tell():,} of {self.size:,} bytes")
        copy.seek(0)
        return copy


class _Ranges(io.RawIOBase):
    """Bytes of a file by ranges, each in one request."""

    def __init__(self, file: RemoteFile):
        super().__init__()
        self._file, self._at, self._size = file, 0, file.size or 0
        system, path = _system(file.address)
        open_it = functools.partial(system.open, path, "rb", block_size=BLOCK_BYTES, cache_type="none", size=file.size)
        self._stream = asked(file.address, open_it)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        num = min(len(buffer), max(self._size - self._at, 0))
        if num:
            buffer[:num] = asked(self._file.address, functools.partial(self._range, num))
        self._at += num
        return num

    def _range(self, num: int) -> bytes:
        found = tried(functools.partial(self._read, num), Exception)  # of whichever library
        if isinstance(found, bytes) and len(found) == num:
            return found
        self._file.require_unchanged()
        raise found if isinstance(found, Exception) else OSError(f"gave {len(found):,} of {num:,} bytes")

    def _read(self, num: int) -> bytes:
        self._stream.seek(self._at)
        return bytes(self._stream.read(num))

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def is_address(pattern: str) -> bool:
    return "://" in pattern


def listed(pattern: str) -> tuple[list[RemoteFile], str]:
    """-> (files, root): those that an address means, a file, a folder or a pattern, and what their names lie below; `root` is
    empty for one that was named. Raises DataError, and Unavailable when the store does not answer."""
    system, path = _system(pattern)
    system.invalidate_cache()
    address = system.unstrip_protocol(path)
    if has_magic(pattern):
        found = asked(pattern, lambda: system.glob(path, detail=True))
        return list(_files(system, found)), address[: _first_magic(address)].rpartition("/")[0]
    info = asked(pattern, lambda: system.info(path))
    if info["type"] != "directory" and not pattern.endswith("/"):
        return [_file(system, path, info)], ""
    return list(_files(system, asked(pattern, lambda: system.find(path, detail=True)))), address.rstrip("/")


def has_magic(pattern: str) -> bool:
    return _first_magic(pattern) < len(pattern)


def _first_magic(pattern: str) -> int:
    """Place of the first wildcard; `?` begins a query in addresses of the web."""
    signs = "*[" if pattern.startswith("http") else "*?["
    return min((at for at in map(pattern.find, signs) if at >= 0), default=len(pattern))


def _without_query(address: str) -> str:
    return address.partition("?")[0] if address.startswith("http") else address


def _files(system: Any, infos: Mapping[str, Mapping[str, Any]]) -> Iterator[RemoteFile]:
    for path, info in infos.items():
        if info["type"] == "file":
            told = info if info.get("size") is not None else asked(path, functools.partial(system.info, path))
            yield _file(system, path, told)


def _file(system: Any, path: str, info: Mapping[str, Any]) -> RemoteFile:
    mark = next((info[key] for key in MARKS if info.get(key)), "")
    mark = mark.timestamp() if isinstance(mark, datetime) else mark  # which lists have as a number
    return RemoteFile(system.unstrip_protocol(path), info.get("size"), str(mark))


def _system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it. Raises DataError where its client is not installed."""
    import fsspec

    protocol = address.partition("://")[0]
    found = tried(lambda: fsspec.core.url_to_fs(address, **_options(protocol)), ImportError, ValueError)
    if isinstance(found, ImportError):
        needed = CLIENTS.get(protocol, "'trinity-moe[data]'")
        raise DataError(f"{address} needs a client of {protocol}:// that is not installed: pip install {needed}")
    if isinstance(found, Exception):
        raise DataError(f"{address} is no address that can be read: {found}")
    return cast(tuple[Any, str], found)


def _options(protocol: str) -> dict[str, Any]:
    """Options that fsspec's client of the web lacks: proxies, and a limit for each pause, not for all of an answer."""
    if protocol not in ("http", "https"):
        return {}
    import aiohttp

    limit = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
    return {"client_kwargs": {"trust_env": True, "timeout": limit}}


@functools.lru_cache(maxsize=1 << 16)
def _reads_ranges(address: str) -> bool:
    """Ask whether it can be read from any place: a server of the web that takes no ranges sends the whole of a file instead."""
    if not address.startswith("http"):
        return True
    system, path = _system(address)
    with system.open(path, "rb", block_size=2, cache_type="none") as stream:
        if not stream.seekable() or stream.size < 2:
            return False
        stream.seek(1)
        return not isinstance(tried(functools.partial(stream.read, 1), ValueError), ValueError)


class Refused(DataError):
    """A store says no."""


class NotThere(DataError):
    """Nothing is at an address."""


def read(address: str, begin: int = 0, end: int | None = None) -> bytes | None:
    """Bytes begin : end of what lies at an address; None where nothing does. Raises as `asked` does."""
    system, path = _system(address)
    found = tried(lambda: asked(address, lambda: _some(system, path, begin, end)), NotThere)
    return None if isinstance(found, NotThere) else found


def _some(system: Any, path: str, begin: int, end: int | None) -> bytes:
    data = bytes(system.cat_file(path, **({} if end is None else {"start": begin, "end": end})))
    if end is not None and len(data) != end - begin:
        raise OSError(f"gave {len(data):,} of {end - begin:,} bytes")
    return data


def write(address: str, content: Path | bytes) -> None:
    """Write a file, or these bytes, to an address, which then has all of it or what it had. Raises as `asked` does."""
    system, path = _system(address)
    asked(address, lambda: _written(system, path, content), "written")


def _written(system: Any, path: str, content: Path | bytes) -> None:
    if "file" in system.protocol:  # where folders are made, and files renamed when whole
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        scratch = f"{path}.{uuid4().hex}"
        system.pipe_file(scratch, content) if isinstance(content, bytes) else system.put_file(str(content), scratch)
        system.mv(scratch, path)
    elif isinstance(content, bytes):
        system.pipe_file(path, content)
    else:
        system.put_file(str(content), path, **({"method": "put"} if "http" in system.protocol else {}))


def asked(address: str, call: Callable[[], T], done: str = "read") -> T:
    """Return what `call` asks a store for, with patience: that the address be read, or what else is `done` with it. Raises
    DataError for what will not change by itself, Unavailable for what may; `call` must be harmless when repeated."""
    return retrying(functools.partial(_once, address, call, done), time.monotonic() + PATIENCE_S, Unavailable)


def _once(address: str, call: Callable[[], T], done: str) -> T:
    found = tried(call, Exception)  # whatever the client of that store raises
    if isinstance(found, TrinityError):
        raise found
    if isinstance(found, Exception):
        raise _ours(address, found, done) from None
    return found


def _ours(address: str, error: Exception, done: str) -> TrinityError:
    """Our error for that of a store's client."""
    status, root = _status(error), _root(error)
    reason = str(root).strip() or type(root).__name__
    if status in (401, 403) or isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return Refused(
            f"{address} may not be {done} ({reason}); give its client keys that may, for s3:// AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or a profile, for public buckets FSSPEC_S3='{\"anon\": true}'"
        )
    is_missing = isinstance(root, FileNotFoundError) or {type(error), type(root)} == {FileNotFoundError, KeyError}
    if status == 404 or (status is None and is_missing):  # the latter is how memory:// says it
        return NotThere(f"{address} is not there ({reason}); check the address, and the bucket or repository in it")
    if isinstance(root, LASTING) if status is None else 400 <= status < 500 and status not in (408, 429):
        return DataError(f"{address} cannot be {done}: {reason}")
    return Unavailable(
        f"{address} cannot be {done} now, its store does not answer or refuses: {reason}; start again when it does, what is "
        "prepared so far is kept"
    )


def _root(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _root(error.__cause__)


def _status(error: BaseException | None) -> int | None:
    """HTTP's status behind an error, as aiohttp, botocore, huggingface_hub and gcsfs tell it."""
    if error is None:
        return None
    answer = getattr(error, "response", None)
    told = [getattr(error, "status", None), getattr(answer, "status_code", None)]
    if isinstance(answer, dict):
        told.append(answer.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    if type(error).__module__.startswith("gcsfs"):
        told.append(getattr(error, "code", None))
    return next((code for code in told if isinstance(code, int)), None) or _status(error.__cause__)
