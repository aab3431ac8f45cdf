"""Workers that meet on a port that is taken meet on another one; other errors stay what they are."""

import socket

import pytest
from ray.exceptions import RayTaskError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.failure_handling.default import RETRYABLE_CONTROLLER_ERRORS
from torch.distributed import DistNetworkError, TCPStore

from actors.rendezvous import MeetingBackend, MeetingConfig


def error_of(port):
    """What torch says where it cannot listen, as a worker's task has it."""
    with pytest.raises(DistNetworkError) as found:
        TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    return RayTaskError("_setup_torch_process_group", str(found.value), found.value)


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_taken_port_has_the_group_start_again(monkeypatch, is_taken):
    with socket.create_server(("127.0.0.1", 0)) as held:
        error = error_of(held.getsockname()[1]) if is_taken else RayTaskError("setup", "no route to host", OSError())

    def on_start(*_):
        raise error

    monkeypatch.setattr(_TorchBackend, "on_start", on_start)
    with pytest.raises(RETRYABLE_CONTROLLER_ERRORS if is_taken else RayTaskError):
        MeetingBackend().on_start(None, TorchConfig())
    assert MeetingConfig(backend="gloo").backend_cls is MeetingBackend
