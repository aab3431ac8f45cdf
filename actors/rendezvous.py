"""The meeting of a run's workers: another port where the one that was found free is taken by the time it is used.

Decisions. Ray asks the kernel for a free port on worker 0's node, gives it back, and has torch listen on it a little later. Who
took it in between ended the run: Ray starts a group again when its workers die, not when they cannot meet. So a taken port is
told as a group that failed to start, and the next one finds another port. Whatever else keeps workers from meeting ends the
run as before.
"""

from typing import Any

from ray.exceptions import RayTaskError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

TAKEN = "EADDRINUSE"


class MeetingBackend(_TorchBackend):
    """Ray's, but for that."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        try:
            super().on_start(worker_group, backend_config)
        except RayTaskError as error:
            if TAKEN not in str(error):
                raise
            raise WorkerGroupStartupFailedError(f"the workers start again, on another port: {error.cause}") from error


class MeetingConfig(TorchConfig):
    @property
    def backend_cls(self) -> type[MeetingBackend]:
        return MeetingBackend
