"""Frames of the direct transport: a fixed header, then raw tensor buffers in a fixed order. Nothing in them can run code.

Legend: R rows, D model, A assignments (row, expert).
Decisions: everything a receiver must know to allocate is in the header, and is checked against what the shard is before
a byte of payload is read; tensors are received into their own memory and sent from it; bf16 travels as bf16.
"""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trinity import errors
from trinity.errors import TrinityError
from trinity.messages import Backward, Forward, Rows

MAGIC = b"TRN1"  # the last byte is the format's version
INFER, BACKWARD, ANSWER, FAILURE = 1, 2, 3, 4
KEEP, HAS_ROWS = 1, 2  # flags
DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
MAX_PAYLOAD_BYTES = 1 << 31
MAX_FAILURE_BYTES = 1 << 16
# magic, kind, dtype, flags, -, request, op_id, layer, epoch, version, deadline_s, R, D, A
HEADER = struct.Struct("<4sBBBxQ40sIqqdIII")


class BadFrame(TrinityError):
    """What arrived is no frame for this receiver; the connection ends."""

    code = errors.Code.INVALID


@dataclass(frozen=True)
class Limits:
    """What a receiver accepts."""

    hidden_size: int
    num_experts: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Header:
    kind: int
    request: int
    dtype: torch.dtype = torch.float32
    flags: int = 0
    op_id: str = ""
    layer: int = 0
    epoch: int = 0
    version: int = 0
    deadline_s: float = 0.0
    num_rows: int = 0
    dim: int = 0
    num_assigned: int = 0

    def pack(self) -> bytes:
        op_id = self.op_id.encode()
        assert len(op_id) <= 40, self.op_id
        counts = (self.num_rows, self.dim, self.num_assigned)
        names = (op_id, self.layer, self.epoch, self.version, self.deadline_s)
        return HEADER.pack(MAGIC, self.kind, DTYPES.index(self.dtype), self.flags, self.request, *names, *counts)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> "Header":
        """Raises BadFrame for another protocol, version or type."""
        magic, kind, dtype, flags, request, op_id, *rest = HEADER.unpack(data)
        if magic != MAGIC:
            raise BadFrame(f"frame starts with {magic!r}, this side speaks {MAGIC!r}")
        if kind not in (INFER, BACKWARD, ANSWER, FAILURE) or dtype >= len(DTYPES):
            raise BadFrame(f"frame of kind {kind} and type {dtype} is unknown")
        if not math.isfinite(rest[3]):
            raise BadFrame(f"deadline {rest[3]} is not a time")
        name = op_id.rstrip(b"\0").decode("ascii", "replace")
        header = cls(kind, request, DTYPES[dtype], flags, name, *rest)
        if header.payload_bytes > (MAX_FAILURE_BYTES if kind == FAILURE else MAX_PAYLOAD_BYTES):
            raise BadFrame(f"frame of {header.payload_bytes} bytes is over the limit of {MAX_PAYLOAD_BYTES}")
        return header

    @property
    def payload_bytes(self) -> int:
        if self.kind == FAILURE:
            return self.num_rows
        rows = self.num_rows * self.dim * self.dtype.itemsize
        if self.kind == ANSWER:
            return rows + 4 * self.num_assigned
        both = 2 if self.kind == BACKWARD and self.flags & HAS_ROWS else 1
        return both * rows + 12 * self.num_assigned

    def check(self, limits: Limits) -> None:
        """Raise BadFrame unless a shard of these limits can compute it."""
        if self.kind not in (INFER, BACKWARD):
            raise BadFrame(f"a shard takes requests, not frames of kind {self.kind}")
        if self.dim != limits.hidden_size:
            raise BadFrame(f"rows have {self.dim} columns, this shard's model has {limits.hidden_size}")
        if self.dtype != limits.dtype:
            raise BadFrame(f"rows are {self.dtype}, this shard's are {limits.dtype}")
        if self.num_assigned > self.num_rows * limits.num_experts:
            raise BadFrame(f"{self.num_assigned} assignments for {self.num_rows} rows of {limits.num_experts} experts")

    def buffers(self) -> list[Tensor]:
        """Memory for the payload, in order."""
        rows = (self.num_rows, self.dim)
        if self.kind == FAILURE:
            return [torch.empty(self.num_rows, dtype=torch.uint8)]
        first = [torch.empty(rows, dtype=self.dtype)]
        if self.kind == ANSWER:
            return first + [torch.empty(self.num_assigned, dtype=torch.float32)] * bool(self.num_assigned)
        if self.kind == BACKWARD:
            if not self.flags & HAS_ROWS:
                return first
            first = [*first, torch.empty(rows, dtype=self.dtype)]
        pair = torch.empty((2, self.num_assigned), dtype=torch.int32)
        return [*first, pair, torch.empty(self.num_assigned, dtype=torch.float32)]


def request(number: int, call: Forward | Backward) -> tuple[Header, list[Tensor]]:
    """A call as a frame."""
    rows = call.rows
    num_assigned = 0 if rows is None else len(rows.row_A)
    names: dict[str, Any] = dict(
        op_id=call.op_id, layer=call.layer, epoch=call.epoch, version=call.version, deadline_s=call.deadline_s
    )
    sent = (
        [] if rows is None else [rows.x_RD, torch.stack([rows.row_A.cpu(), rows.expert_A.cpu()]).int(), rows.weight_A]
    )
    if isinstance(call, Forward):
        kind, flags, first = INFER, KEEP * call.keep, sent[0]
    else:
        kind, flags, first = BACKWARD, HAS_ROWS * (rows is not None), call.dy_RD
        sent = [call.dy_RD, *sent]
    num_rows, dim = first.shape
    names |= dict(num_rows=num_rows, dim=dim, num_assigned=num_assigned)
    return Header(kind, number, first.dtype, flags, **names), sent


def call_of(header: Header, buffers: Sequence[Tensor], limits: Limits) -> Forward | Backward:
    """The inverse of `request`. Raises BadFrame for indices outside the rows or the experts."""
    names: dict[str, Any] = {k: getattr(header, k) for k in ("op_id", "layer", "epoch", "version", "deadline_s")}
    if header.kind == INFER:
        return Forward(**names, rows=_rows(header, buffers, limits), keep=bool(header.flags & KEEP))
    rows = _rows(header, buffers[1:], limits) if header.flags & HAS_ROWS else None
    return Backward(**names, dy_RD=buffers[0], rows=rows)


def _rows(header: Header, buffers: Sequence[Tensor], limits: Limits) -> Rows:
    x_RD, pair, weight_A = buffers
    row_A, expert_A = pair.long()
    for name, index, bound in (("row", row_A, header.num_rows), ("expert", expert_A, limits.num_experts)):
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < bound:
            raise BadFrame(f"{name} {int(index.max())} is outside 0 to {bound - 1}")
    return Rows(x_RD, row_A, expert_A, weight_A)


def answer(number: int, value: Any) -> tuple[Header, list[Tensor]]:
    """What a shard returned: y_RD, or (dx_RD, dweight_A), or the TrinityError it raised."""
    if isinstance(value, TrinityError):
        text = json.dumps({"kind": type(value).__name__, "message": value.message}).encode()[:MAX_FAILURE_BYTES]
        return Header(FAILURE, number, num_rows=len(text)), [torch.frombuffer(bytearray(text), dtype=torch.uint8)]
    first, *rest = value if isinstance(value, tuple) else (value,)
    num_rows, dim = first.shape
    return Header(ANSWER, number, first.dtype, num_rows=num_rows, dim=dim, num_assigned=sum(map(len, rest))), [
        first,
        *rest,
    ]


WELCOME = Header(ANSWER, 0)  # what a shard says to a caller that knows the secret


def value_of(header: Header, buffers: Sequence[Tensor]) -> Any:
    """The inverse of `answer`: a tensor, a pair of them, or a TrinityError (not raised)."""
    if header.kind == FAILURE:
        tree = json.loads(bytes(buffers[0].numpy()))
        kind = getattr(errors, tree["kind"], BadFrame)
        return kind(tree["message"])
    if header.kind != ANSWER:
        raise BadFrame(f"a shard answered with a frame of kind {header.kind}")
    return buffers[0] if len(buffers) == 1 else tuple(buffers)
