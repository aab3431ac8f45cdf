"""Shared buffers: memory that both ends of a connection reach, so that large rows need not pass through its socket.

Legend: R rows, D model.
Decisions: the caller makes it and offers it after the handshake, the shard takes or declines it; it travels as a file
descriptor, so it has no name, and it is gone when both ends have let go of it or were killed. A box is lent to a request and
its answer comes back in it: only the caller says which boxes are free, and only the frames on the socket say what is in one.
When none is free, or a tensor is too large for one, the frame goes over the socket as if there were no shared buffer. Memory is
taken when it is first written (on a GPU: at once), and the box that was used last is used first.
"""

import ctypes
import fcntl
import functools
import math
import mmap
import os
import socket
from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from actors.dataplane.frames import DTYPES, INFER, KEEP, BadFrame, Header, offer

if TYPE_CHECKING:
    from actors.dataplane.connection import Wire

NUM_BOXES, BOX_BYTES = 4, 16 << 20  # multiples of every page size, GPUs' too
SIZE = NUM_BOXES * BOX_BYTES


class SharedBuffer(ABC):
    """Boxes that both ends reach. One side `put`s a tensor and then says so on the socket; the other `take`s it."""

    kind: ClassVar[int]  # what an offer calls it
    name: ClassVar[str]
    min_bytes: ClassVar[int]  # smaller tensors are sooner there over the socket

    def __init__(self) -> None:
        self.free, self.lent = list(range(NUM_BOXES)), dict[int, int]()  # the caller's; by request

    @staticmethod
    @abstractmethod
    def make(device: torch.device) -> int:
        """A descriptor of new memory, for both sides to attach and close. Raises OSError where there is no such thing."""

    @classmethod
    @abstractmethod
    def attach(cls, fd: int, device: torch.device) -> "SharedBuffer":
        """Raises BadFrame for a descriptor of something else, OSError where this side cannot use it."""

    @abstractmethod
    def put(self, box: int, tensor: Tensor) -> None:
        """The tensor is there, for every process and device, when this returns."""

    @abstractmethod
    def take(self, header: Header) -> Tensor:
        """The first tensor of that frame, the receiver's own, on its device. Raises BadFrame for what has no place here."""

    @abstractmethod
    def close(self) -> None: ...

    def lend(self, number: int, num_bytes: int) -> int | None:
        """A box for request `number` and its answer, if one is free and large enough."""
        if not self.free or num_bytes > BOX_BYTES:
            return None
        self.lent[number] = self.free.pop()
        return self.lent[number]

    def release_slot(self, number: int) -> None:
        """The answer to that request has been taken. Harmless for one that has no box."""
        if (box := self.lent.pop(number, None)) is not None:
            self.free.append(box)


def place(box: int, num_bytes: int) -> int:
    """The first byte of a box."""
    if box >= NUM_BOXES or num_bytes > BOX_BYTES:
        raise BadFrame(f"{num_bytes} bytes in box {box}; a shared buffer has {NUM_BOXES} boxes of {BOX_BYTES} bytes")
    return box * BOX_BYTES


class HostSharedBuffer(SharedBuffer):
    """Shared memory of a host. A side that computes on a GPU pins it, so that it can copy without staging.

    Round trip to a process that doubles rows of 256 fp32, on 2 busy cores, in microseconds over the socket, and through the
    shared buffer (medians of alternating calls; ratios varied by 0.1 between runs):

        KiB each way            64       128       256       512       1024       2048       4096       8192
        inference          202 198   221 210   265 231   358 272    556 376   1204 665  2561 1516  5383 3213
        kept               203 207   222 226   296 282   454 410    626 469   1286 921  2600 1930  5467 4117
        backward           180 197   203 218   241 240   319 284    485 395   1125 771  2463 1673  4930 3722

    An inference is computed in the shared buffer itself: with a copy it takes 5 % longer up to 2 MiB, then 10 to 20 %.
    """

    kind, name, min_bytes = 1, "shared memory", 256 << 10

    def __init__(self, memory: Tensor, device: torch.device):
        super().__init__()
        self.device, self._undo = device, ExitStack()
        self._boxes = {dtype: memory.view(dtype).view(NUM_BOXES, -1).unbind() for dtype in DTYPES}
        if device.type == "cuda":
            cuda, start = torch.cuda.cudart(), memory.data_ptr()
            if int(cuda.cudaHostRegister(start, SIZE, 0)) == 0:
                self._undo.callback(cuda.cudaHostUnregister, start)

    @staticmethod
    def make(device: torch.device) -> int:
        fd = os.memfd_create("trinity", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, SIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return fd

    @classmethod
    def attach(cls, fd: int, device: torch.device) -> SharedBuffer:
        """Map it. Memory that a peer can shrink, or huge pages that it has used up, would end this process with a SIGBUS."""
        size = os.fstat(fd).st_size
        if size != SIZE or can_shrink(fd):
            raise BadFrame(f"a shared buffer is {SIZE} bytes of sealed memory, not {size} bytes of another kind")
        try:
            with torch.inference_mode(False):  # whoever connects, everybody may write
                return cls(torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=SIZE, dtype=torch.uint8), device)
        except RuntimeError as error:
            raise OSError(f"cannot map {SIZE} bytes: {error}") from None

    def put(self, box: int, tensor: Tensor) -> None:
        self._view(box, tensor.shape, tensor.dtype).copy_(tensor.detach())

    def take(self, header: Header) -> Tensor:
        rows_RD = self._view(header.box, header.shape, DTYPES[header.dtype])
        if self.device.type != "cpu":
            return rows_RD.to(self.device)
        # Nobody looks at an inference's rows once its answer is sent, and until then its caller does not use the box again.
        return rows_RD if header.kind == INFER and not header.flags & KEEP else rows_RD.clone()

    def close(self) -> None:
        self._undo.close()
        self._boxes.clear()  # unmapped with the last view

    def _view(self, box: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        place(box, math.prod(shape) * dtype.itemsize)
        return self._boxes[dtype][box].as_strided(shape, (shape[1], 1))


def can_shrink(fd: int) -> bool:
    """Say whether a peer could take memory of this file away from under us: it is not sealed, or of huge pages."""
    try:
        is_sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError:  # not a kind of file that can be sealed
        return True
    return not is_sealed or os.fstatvfs(fd).f_bsize != mmap.PAGESIZE


def received_descriptor(sock: socket.socket) -> int:
    """The descriptor that follows an offer, the receiver's own. Raises BadFrame where none does."""
    _, fds, _, _ = socket.recv_fds(sock, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not fds:
        raise BadFrame("memory was offered without its descriptor")
    return fds[0]


# -- GPUs

ALLOCATION_PINNED = LOCATION_DEVICE = HANDLE_FILE_DESCRIPTOR = 1  # as in cuda.h
ACCESS_READ_WRITE = 3
_u64, _size, _ref = ctypes.c_uint64, ctypes.c_size_t, ctypes.byref
_library = functools.cache(ctypes.CDLL)


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp: type, requestedHandleTypes, location, win32HandleMetaData, allocFlags."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handles", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", _u64),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


def driver(name: str, *arguments: Any) -> None:
    """Call the CUDA driver. Raises OSError, also where there is none."""
    if error := getattr(_library("libcuda.so.1"), name)(*arguments):
        raise OSError(f"{name} failed with CUDA error {error}")


class CudaSharedBuffer(SharedBuffer):
    """Memory of one GPU, mapped by two processes of its node, on that GPU or on its peers.

    By the driver's virtual memory calls (CUDA C++ Programming Guide, "Virtual Memory Management"), not cudaIpcGetMemHandle:
    they give a descriptor, map no further than the memory reaches, and free it when the last process lets go. With
    cudaIpcGetMemHandle, an owner that frees before its peer has closed is undefined behaviour.
    """

    kind, name, min_bytes = 2, "CUDA memory", 1  # over a socket all of it would cross the bus twice

    def __init__(self, handle: ctypes.c_uint64, device: torch.device):
        """Owns the handle, also when this fails."""
        super().__init__()
        self.device, self._start, size = device, _u64(), _size(SIZE)
        with ExitStack() as undo:
            undo.callback(driver, "cuMemRelease", handle)
            driver("cuMemAddressReserve", _ref(self._start), size, _size(0), _u64(0), _u64(0))
            undo.callback(driver, "cuMemAddressFree", self._start, size)
            driver("cuMemMap", self._start, size, _size(0), handle, _u64(0))
            undo.callback(driver, "cuMemUnmap", self._start, size)
            driver("cuMemSetAccess", self._start, size, _ref(_Access(_location(device), ACCESS_READ_WRITE)), _size(1))
            self._undo = undo.pop_all()

    @staticmethod
    def make(device: torch.device) -> int:
        handle, fd = _u64(), ctypes.c_int(-1)
        wanted = _Properties(ALLOCATION_PINNED, HANDLE_FILE_DESCRIPTOR, _location(device))
        with ExitStack() as undo:
            driver("cuMemCreate", _ref(handle), _size(SIZE), _ref(wanted), _u64(0))
            undo.callback(driver, "cuMemRelease", handle)  # the descriptor keeps it
            driver("cuMemExportToShareableHandle", _ref(fd), handle, ctypes.c_int(HANDLE_FILE_DESCRIPTOR), _u64(0))
        return fd.value

    @classmethod
    def attach(cls, fd: int, device: torch.device) -> SharedBuffer:
        handle = _u64()
        _location(device)  # a thread's first call makes the device current
        driver(
            "cuMemImportFromShareableHandle", _ref(handle), ctypes.c_void_p(fd), ctypes.c_int(HANDLE_FILE_DESCRIPTOR)
        )
        return cls(handle, device)

    def put(self, box: int, tensor: Tensor) -> None:
        source = tensor.detach().contiguous()
        self._copy(self._start.value + place(box, source.nbytes), source.data_ptr(), source.nbytes)

    def take(self, header: Header) -> Tensor:
        dtype = DTYPES[header.dtype]
        start = self._start.value + place(header.box, math.prod(header.shape) * dtype.itemsize)
        rows_RD = torch.empty(header.shape, dtype=dtype, device=self.device)
        self._copy(rows_RD.data_ptr(), start, rows_RD.nbytes)
        return rows_RD

    def close(self) -> None:
        self._undo.close()

    def _copy(self, target: int, source: int, num_bytes: int) -> None:
        """Copy after all that the current stream has to do; done when this returns: the peer knows nothing of our streams."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            driver("cuMemcpyAsync", _u64(target), _u64(source), _size(num_bytes), ctypes.c_void_p(stream.cuda_stream))
            stream.synchronize()


def _location(device: torch.device) -> _Location:
    torch.cuda.synchronize(device)  # starts CUDA where nobody has
    return _Location(LOCATION_DEVICE, torch.cuda.current_device() if device.index is None else device.index)


# -- which one


def possible(near: bool, mine: torch.device, theirs: str) -> list[type[SharedBuffer]]:
    """Kinds that a caller offers to a shard, best first. `near`: on the same host.

    Between nodes, NIXL (memory registered with both agents, one-sided writes) would be one more SharedBuffer, named here;
    instead of a descriptor, its offer carries its agent's metadata.
    """
    if not near or not hasattr(os, "memfd_create"):
        return []
    return [CudaSharedBuffer, HostSharedBuffer] if mine.type == theirs == "cuda" else [HostSharedBuffer]


def agree(wire: "Wire", kinds: list[type[SharedBuffer]], deadline_s: float) -> SharedBuffer | None:
    """The caller's side: the first of `kinds` that works here and there."""
    for kind in kinds:
        with ExitStack() as undo:
            try:
                fd = kind.make(wire.device)
                undo.callback(os.close, fd)
                found = kind.attach(fd, wire.device)
            except OSError:
                continue
            wire.send(offer(kind.kind), [], deadline_s)
            socket.send_fds(wire.sock, [b"\0"], [fd])
            if wire.header(deadline_s) == Header.unpack(offer(kind.kind)):
                return found
            found.close()
    return None


def consider(wire: "Wire", header: Header, deadline_s: float) -> None:
    """The shard's side: take what is offered, or decline what does not work here. Raises BadFrame for what is no offer."""
    known = {kind.kind: kind for kind in possible(True, wire.device, wire.device.type)}
    if header.request not in known or wire.buffer is not None:
        raise BadFrame(f"no shared buffer of kind {header.request} is wanted here")
    fd = received_descriptor(wire.sock)
    try:
        wire.buffer, taken = known[header.request].attach(fd, wire.device), header.request
    except OSError:
        taken = 0
    finally:
        os.close(fd)
    wire.send(offer(taken), [], deadline_s)
