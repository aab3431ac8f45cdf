"""The CUDA shared buffer, over a driver that has host memory instead of a GPU's."""

import contextlib
import ctypes
import os
import sys

import pytest
import torch

from actors.dataplane import frames, shm
from actors.dataplane.connection import CPU
from actors.dataplane.frames import BadFrame, Header, in_shared_buffer
from actors.dataplane.shm import BOX_BYTES, NUM_BOXES, SIZE, CudaSharedBuffer
from tests.unit.shared_buffers import DIM, num_descriptors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd")


class Driver:
    """What CudaSharedBuffer asks of the CUDA driver. Counts what is made and let go; fails at call number `fails_at`."""

    def __init__(self, fails_at=None):
        self.fails_at, self.calls, self.held, self.memory = fails_at, [], [], ctypes.create_string_buffer(SIZE)

    def __call__(self, name, *arguments):
        self.calls.append(name)
        if len(self.calls) == self.fails_at:
            raise OSError(f"{name} failed with CUDA error 2")
        getattr(self, name, lambda *_: None)(*arguments)

    def cuMemCreate(self, handle, size, properties, flags):
        wanted = properties._obj
        assert (size.value, wanted.type, wanted.handles, wanted.location.type) == (SIZE, 1, 1, 1)
        handle._obj.value = 77
        self.held.append("memory")

    def cuMemExportToShareableHandle(self, fd, handle, kind, flags):
        assert handle.value == 77
        fd._obj.value = os.open("/dev/null", os.O_RDONLY)

    def cuMemImportFromShareableHandle(self, handle, fd, kind):
        os.fstat(fd.value)
        handle._obj.value = 78
        self.held.append("memory")

    def cuMemRelease(self, handle):
        self.held.remove("memory")

    def cuMemAddressReserve(self, start, size, alignment, wanted, flags):
        start._obj.value = ctypes.addressof(self.memory)
        self.held.append("address")

    def cuMemAddressFree(self, start, size):
        assert "map" not in self.held
        self.held.remove("address")

    def cuMemMap(self, start, size, offset, handle, flags):
        assert (start.value, handle.value) == (ctypes.addressof(self.memory), 78)
        self.held.append("map")

    def cuMemUnmap(self, start, size):
        self.held.remove("map")

    def cuMemcpyAsync(self, target, source, size, stream):
        ctypes.memmove(target.value, source.value, size.value)


class Stream:
    cuda_stream = 0
    num_synchronized = 0

    def synchronize(self):
        Stream.num_synchronized += 1


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(shm, "driver", made)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    return made


def test_cuda_rows_lie_where_the_header_says(driver):
    fd = CudaSharedBuffer.make(CPU)
    box = CudaSharedBuffer.attach(fd, CPU)
    os.close(fd)
    x_RD = torch.randn(3, DIM).to(torch.bfloat16)
    before = Stream.num_synchronized
    box.put(2, x_RD)
    assert bytes(driver.memory[2 * BOX_BYTES : 2 * BOX_BYTES + x_RD.nbytes]) == x_RD.view(torch.uint8).numpy().tobytes()
    head = Header.unpack(in_shared_buffer(frames.answer(1, x_RD)[0], 2))
    assert torch.equal(box.take(head), x_RD)
    assert Stream.num_synchronized == before + 2
    for wrong in (head._replace(box=NUM_BOXES), head._replace(num_rows=2**31)):
        with pytest.raises(BadFrame):
            box.take(wrong)
    box.close()
    assert driver.held == []


@pytest.mark.parametrize("fails_at", [1, 2, 4, 5, 6, 7])  # the third lets go
def test_a_cuda_call_that_fails_leaves_nothing(driver, fails_at):
    before, driver.fails_at = num_descriptors(), fails_at
    with pytest.raises(OSError, match="CUDA error 2"):
        attached_and_closed()
    assert driver.held == []
    assert num_descriptors() == before


def test_a_cuda_shared_buffer_is_let_go_of_once(driver):
    attached_and_closed()
    assert (len(driver.calls), driver.held) == (10, [])


def attached_and_closed():
    fd = CudaSharedBuffer.make(CPU)
    try:
        box = CudaSharedBuffer.attach(fd, CPU)
    finally:
        os.close(fd)
    box.close()
    box.close()


def test_the_driver_s_structures_have_the_driver_s_sizes():
    assert [ctypes.sizeof(s) for s in (shm._Location, shm._Properties, shm._Access)] == [8, 32, 12]


def test_where_there_is_no_driver_that_is_an_os_error():
    if not torch.cuda.is_available():
        with pytest.raises(OSError, match="libcuda"):
            shm.driver("cuInit", 0)
