"""Frames of the direct transport: a fixed header, then raw tensor buffers in a fixed order. Nothing in them can run code.

Legend: R rows, D model, K slots of a row.
Decisions: everything a receiver must know to allocate is in the header, and is checked against what the shard is before
a byte of payload is read; tensors are received into their own memory and sent from it; bf16 travels as bf16. Time that is left
travels, not a time of day: hosts' clocks differ. The first
tensor (x, dy, y, dx) may lie in a box of the connection's shared buffer instead of in the stream (shm.py). This is the
path of every row: what can be done once per connection or by one call into C is.
"""

import json
import math
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity import errors
from trinity.errors import TrinityError
from trinity.rpc.messages import PROTOCOL, REMOTE, Backward, Fetch, Forward, Rows

MAGIC = b"TRN%c" % PROTOCOL
INFER, BACKWARD, ANSWER, FAILURE, OFFER, FETCH, BYTES = 1, 2, 3, 4, 5, 6, 7
Calls = Forward | Backward | Fetch
KEEP, HAS_ROWS, IN_SHARED_BUFFER, HAS_ADAPTERS = 1, 2, 4, 8  # flags
DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
CODE_OF = {dtype: code for code, dtype in enumerate(DTYPES)}
MAX_PAYLOAD_BYTES = 1 << 31
MAX_FAILURE_BYTES = 1 << 16
MAX_OP_ID_BYTES = 40
SLOT_BYTES = 8 + 4  # id and weight
ADAPTER_BYTES = 8  # of one row
# magic, kind, dtype, flags, box, request, op_id, layer, epoch, version, left_s, R, D, K, priority
HEADER = struct.Struct(f"<4sBBBBQ{MAX_OP_ID_BYTES}sIqqdIIIq")


class BadFrame(TrinityError):
    """Error about what arrived and is no frame for this receiver; the connection ends."""

    code = errors.Code.INVALID


@dataclass(frozen=True)
class FrameLimits:
    """Limits on what a receiver accepts."""

    hidden_size: int
    num_experts: int
    dtype: torch.dtype


class Header(NamedTuple):
    magic: bytes
    kind: int
    dtype: int
    flags: int
    box: int  # of the shared buffer
    request: int
    op_id: bytes
    layer: int
    epoch: int
    version: int
    left_s: float  # until nobody waits for the answer, when the frame was sent
    num_rows: int
    dim: int
    num_slots: int
    priority: int  # of inference

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> "Header":
        """Raises BadFrame for another protocol, version or type."""
        header = cls._make(HEADER.unpack(data))
        if header.magic != MAGIC:
            raise BadFrame(f"frame starts with {header.magic!r}, this side speaks {MAGIC!r}")
        if not INFER <= header.kind <= BYTES or header.dtype >= len(DTYPES):
            raise BadFrame(f"frame of kind {header.kind} and type {header.dtype} is unknown")
        if not math.isfinite(header.left_s):
            raise BadFrame(f"{header.left_s} s to the deadline are not a time")
        if header.payload_bytes > (MAX_FAILURE_BYTES if header.kind == FAILURE else MAX_PAYLOAD_BYTES):
            raise BadFrame(f"frame of {header.payload_bytes} bytes is over the limit of {MAX_PAYLOAD_BYTES}")
        return header

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the first tensor."""
        return self.num_rows, self.dim

    @property
    def payload_bytes(self) -> int:
        """Bytes of all tensors, wherever they lie."""
        if self.kind >= FAILURE:
            return self.num_rows if self.kind in (FAILURE, BYTES) else 0
        rows = self.num_rows * self.dim * DTYPES[self.dtype].itemsize
        if self.kind == ANSWER:
            return rows + 4 * self.num_rows * self.num_slots
        both = 2 if self.kind == BACKWARD and self.flags & HAS_ROWS else 1
        adapters = ADAPTER_BYTES * self.num_rows if self.has_adapters else 0
        return both * rows + SLOT_BYTES * self.num_rows * self.num_slots + adapters

    @property
    def has_adapters(self) -> bool:
        """Does it say of each row which adapter it is for?"""
        return self.kind == INFER and bool(self.flags & HAS_ADAPTERS)

    def check(self, limits: FrameLimits) -> None:
        """Raise BadFrame unless a shard of these limits can compute it."""
        if self.kind not in (INFER, BACKWARD, FETCH):
            raise BadFrame(f"a shard takes requests, not frames of kind {self.kind}")
        if self.kind == FETCH:
            if self.num_rows >= limits.num_experts:
                raise BadFrame(f"expert {self.num_rows} is outside 0 to {limits.num_experts - 1}")
            return
        if self.dim != limits.hidden_size:
            raise BadFrame(f"rows have {self.dim} columns, this shard's model has {limits.hidden_size}")
        if DTYPES[self.dtype] != limits.dtype:
            raise BadFrame(f"rows are {DTYPES[self.dtype]}, this shard's are {limits.dtype}")
        if self.num_slots > limits.num_experts:
            raise BadFrame(f"rows have {self.num_slots} slots, this shard's model has {limits.num_experts} experts")

    def buffers(self, first: Tensor | None = None, pinned: bool = False) -> list[Tensor]:
        """Memory for the payload, in order; `first` where it has arrived already. Rows lie where torch puts its own tensors:
        products may round otherwise."""
        if self.kind >= FAILURE:
            return [torch.empty(self.payload_bytes, dtype=torch.uint8)]
        slots = (self.num_rows, self.num_slots)
        if first is None:
            first = torch.empty((self.num_rows, self.dim), dtype=DTYPES[self.dtype], pin_memory=pinned)
        if self.kind == ANSWER:
            return [first, torch.empty(slots)] if self.num_slots else [first]
        if self.kind == BACKWARD and not self.flags & HAS_ROWS:
            return [first]
        ids, weights = torch.from_numpy(np.empty(slots, np.int64)), torch.from_numpy(np.empty(slots, np.float32))
        if self.kind == INFER:
            own = [torch.from_numpy(np.empty(self.num_rows, np.int64))] if self.has_adapters else []
            return [first, ids, weights, *own]
        return [first, torch.empty(self.shape, dtype=first.dtype), ids, weights]


def request(number: int, call: Calls) -> tuple[bytes, list[Tensor]]:
    """A call as a frame: its header, and the tensors whose memory follows. A Fetch has none; its expert and kind stand where
    others have their number of rows and op_id."""
    left_s = call.deadline_s - time.monotonic()
    if isinstance(call, Fetch):
        names = (call.kind.encode(), call.layer, 0, call.version, left_s)
        return HEADER.pack(MAGIC, FETCH, 0, 0, 0, number, *names, call.expert, 0, 0, 0), []
    rows = call.rows
    sent = [] if rows is None else [rows.x_RD, rows.ids_RK, rows.weights_RK]
    if isinstance(call, Forward):
        kind, flags = INFER, KEEP if call.keep else 0
        if call.rows.adapter_R is not None:
            flags, sent = flags | HAS_ADAPTERS, [*sent, call.rows.adapter_R]
    else:
        kind, flags, sent = BACKWARD, HAS_ROWS if sent else 0, [call.dy_RD, *sent]
    num_rows, dim = sent[0].shape
    op_id = call.op_id.encode()
    assert len(op_id) <= MAX_OP_ID_BYTES, call.op_id
    names = (op_id, call.layer, call.epoch, call.version, left_s)
    shape = num_rows, dim, 0 if rows is None else rows.ids_RK.shape[1]
    priority = call.priority if isinstance(call, Forward) else 0
    return HEADER.pack(MAGIC, kind, CODE_OF[sent[0].dtype], flags, 0, number, *names, *shape, priority), sent


def call_of(header: Header, buffers: Sequence[Tensor], limits: FrameLimits, came_s: float) -> Calls:
    """The inverse of `request`; the header came when this side's clock said `came_s`. Raises BadFrame for ids that are no
    experts."""
    op_id, deadline_s = header.op_id.rstrip(b"\0").decode("ascii", "replace"), came_s + header.left_s
    names = (op_id, header.layer, header.epoch, header.version, deadline_s)
    if header.kind == FETCH:
        return Fetch(header.layer, header.num_rows, header.version, deadline_s, op_id)
    if header.kind == INFER:
        return Forward(*names, _rows(buffers, limits), bool(header.flags & KEEP), header.priority)
    return Backward(*names, buffers[0], _rows(buffers[1:], limits) if header.flags & HAS_ROWS else None)


def _rows(buffers: Sequence[Tensor], limits: FrameLimits) -> Rows:
    rows = Rows(*buffers)
    if rows.ids_RK.numel():
        low, high = map(int, torch.aminmax(rows.ids_RK))
        if low < REMOTE or high >= limits.num_experts:
            raise BadFrame(f"expert {low if low < REMOTE else high} is outside 0 to {limits.num_experts - 1}")
    return rows


def answer(number: int, value: Any) -> tuple[bytes, list[Tensor]]:
    """Frame of what a shard returned: y_RD, or (dx_RD, dweights_RK), or the TrinityError it raised."""
    if isinstance(value, TrinityError):
        text = json.dumps({"kind": type(value).__name__, "message": value.message}).encode()[:MAX_FAILURE_BYTES]
        return _head(FAILURE, 0, number, len(text)), [torch.frombuffer(bytearray(text), dtype=torch.uint8)]
    sent = list(value) if isinstance(value, tuple) else [value]
    num_slots = sent[1].shape[1] if len(sent) == 2 else 0
    num_rows, dim = sent[0].shape
    return _head(ANSWER, CODE_OF[sent[0].dtype], number, num_rows, dim, num_slots), sent


def piece(number: int, num_bytes: int) -> bytes:
    """The header of so many bytes that are no rows, between engines."""
    return _head(BYTES, 0, number, num_bytes)


def refusal(error: TrinityError) -> bytes:
    """The whole frame with which a shard ends a connection."""
    head, (text,) = answer(0, error)
    return head + text.numpy().tobytes()


def _head(
    kind: int, dtype: int, number: int, num_rows: int = 0, dim: int = 0, num_slots: int = 0, left_s: float = 0.0
) -> bytes:
    return HEADER.pack(MAGIC, kind, dtype, 0, 0, number, b"", 0, 0, 0, left_s, num_rows, dim, num_slots, 0)


def offer(kind: int) -> bytes:
    """A shared buffer of that kind, from a caller; from a shard: the kind it took, or 0."""
    return _head(OFFER, 0, kind)


def in_shared_buffer(header: bytes, box: int) -> bytes:
    """The header of the same frame with its first tensor in a box of the shared buffer."""
    return header[:6] + bytes((header[6] | IN_SHARED_BUFFER, box)) + header[8:]


def welcome(now_s: float) -> bytes:
    """First words of a shard to a caller that knows the secret; its time of day stands where requests have what is left."""
    return _head(ANSWER, 0, 0, left_s=now_s)


WELCOME = welcome(0.0)


def value_of(header: Header, buffers: Sequence[Tensor]) -> Any:
    """The inverse of `answer`: a tensor, a pair of them, or a TrinityError (not raised)."""
    if header.kind == ANSWER:
        return buffers[0] if len(buffers) == 1 else tuple(buffers)
    if header.kind != FAILURE:
        raise BadFrame(f"a shard answered with a frame of kind {header.kind}")
    tree = json.loads(bytes(buffers[0].numpy()))
    return getattr(errors, tree["kind"], BadFrame)(tree["message"])
