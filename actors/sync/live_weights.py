"""The weights of a run while it trains, for an engine: experts stay on the trainer's shards, the backbone is copied from it.

A WeightSource (trinity/engine/weights.py). Decisions: which version is served is the placement service's word, which a thread
of this process hears; a version's backbone is read from the memory in which the trainer keeps it, or from its node, by another
thread, and is the newest when it is there; a version that is held gets a model of its own and a lease with the service, so
that shards and trainer keep it. Versions go by their names (trinity/utils/lines.py), so that none is taken for the same step of
a run that has gone back: shards say which line theirs are of, and a backbone is of the line that the run was at before it was
read and after, because the line changes before any memory does.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import torch

from actors.names import PlacementClient
from actors.sync import placement_watcher, shm_state
from trinity.config import RUN_TOKENIZER, Config, ModelConfig
from trinity.dispatch.dispatcher import Dispatcher
from trinity.dispatch.view import PlacementView
from trinity.engine.double_buffer import ModelDoubleBuffer
from trinity.errors import ConfigError, StepConflict, TrinityError, Unavailable, VersionGone
from trinity.models.common.decoder import CausalLM
from trinity.models.registry import build
from trinity.pool.ledger import Decision
from trinity.text.tokenizer import Tokenizer
from trinity.train.backbone import WEIGHT, load_values
from trinity.utils.lines import line_of, named, step_of
from trinity.utils.trying import retrying, tried

log = logging.getLogger(__name__)
LEASE_S = 30.0
POLL_S, AGAIN_S = 0.1, 0.5


class LivePool(Protocol):
    """Questions to a pool that trains (actors/pool.py)."""

    name: str
    service: PlacementClient
    view: PlacementView
    timeout_s: float

    def decided(self) -> Decision | None: ...

    def dispatcher(self, version: int = 0, timeout_s: float | None = None) -> Dispatcher: ...


def live_source(pool: LivePool, config: Config, run_dir: str) -> "tuple[LiveWeights, ModelConfig, Tokenizer]":
    """The source that `serve.weights` names, of the run in that folder. Waits for the run's first version. Raises Unavailable
    when there is none, and ConfigError for a version that is not kept."""
    decision = _first_decision(pool, config.placement.ready_timeout_s)
    device = "cuda" if config.engine.num_gpus else "cpu"
    timeout_s = config.serve.request_timeout_s
    model, engine = pool.service.spec().model, config.engine
    source = LiveWeights(pool, model, decision, device, engine.preload, timeout_s, engine.weight_dtype)
    if config.serve.weights != "live":
        source.pin(config.serve.pinned_step)
    return source, source.config, Tokenizer.load(Path(run_dir) / RUN_TOKENIZER)


def _first_decision(pool: LivePool, timeout_s: float) -> Decision:
    def found() -> Decision:
        if (decision := pool.decided()) is None:
            raise Unavailable(f"pool {pool.name!r} has no weights after {timeout_s:.0f} s; is anybody training in it?")
        return decision

    return retrying(found, time.monotonic() + timeout_s)


class LiveWeights:
    """Owned by one engine's thread. Its own threads renew what it holds, and copy newer versions."""

    def __init__(
        self,
        pool: LivePool,
        config: ModelConfig,
        decision: Decision,
        device: str = "cpu",
        preload: bool = True,
        timeout_s: float | None = None,
        weight_dtype: str = "auto",
    ):
        """`timeout_s`: for a layer's rows; default: the pool's. `weight_dtype`: see EngineConfig."""
        self.pool, self.config, self.device, self.timeout_s = pool, config, device, timeout_s
        self._weight_dtype = weight_dtype
        self._me, self._places = uuid4().hex[:12], decision.notes["backbone"]
        self._lender = shm_state.Lender()
        self._models = ModelDoubleBuffer(self._made, self._load, preload)
        self._experts: list[Dispatcher] = []
        self._held = Counter[int]()
        self._pinned: int | None = None
        self._guard = threading.Lock()  # of the two below
        self._bad: set[int] = set()
        self._good = named(decision.line, decision.version)
        self._identity = pool.service.identity()
        view = pool.view
        assert isinstance(view, placement_watcher.PlacementWatcher)
        view.watch_version(self._good)
        self._view = view
        self._stopped = threading.Event()
        for work, name in ((self._renew, "trinity-leases"), (self._keep_up, "trinity-weights")):
            threading.Thread(target=work, name=name, daemon=True).start()
        placement_watcher.stop_before_leaving(self)

    def pin(self, step: int | None) -> None:
        """Serve that version for good; None: the one that is served now."""
        try:
            self._pinned = self.pool.service.pin(step, self._holder("pinned"), LEASE_S)
        except TrinityError as error:
            said = f"--weights pinned:{step_of(step or 0)}: {error.message}"
            raise ConfigError(f"{said}; or serve that step's checkpoint") from None

    def stop(self) -> None:
        self._stopped.set()

    # -- a WeightSource

    def newest(self) -> int:
        return self._good if self._pinned is None else self._pinned

    def model(self, version: int) -> CausalLM:
        return self._models.get(version, hold=self._held[version] > 0)

    def hold(self, version: int) -> None:
        self._held[version] += 1
        if self._held[version] == 1:
            self._models.hold(version)
            self._ask("pin", version, self._holder(version), LEASE_S)

    def release(self, version: int) -> None:
        self._held[version] -= 1
        if self._held[version] <= 0:
            del self._held[version]
            self._models.release(version)
            self._ask("unpin", self._holder(version))

    def quarantine(self, version: int) -> None:
        if version not in self._bad:
            with self._guard:
                self._bad.add(version)
                before = (named(line_of(version), step) for step in reversed(range(step_of(version))))
                self._good = next((older for older in before if older not in self._bad), version)
            self._ask("quarantine", version)

    def line(self, version: int) -> str:
        """Name of the weights that this version is one of: equal names and versions are equal weights, whichever engine
        asks."""
        return f"{self._identity}/{line_of(version)}"

    def counts(self) -> tuple[int, dict[str, tuple[list[int], float]]]:
        """Retries, and seconds by phase, of all its dispatchers."""
        retries = sum(each.num_retries for each in self._experts)
        phases: dict[str, tuple[list[int], float]] = {}
        for each in self._experts:
            for phase, (buckets, seconds) in each.times.phases.items():
                before, sum_s = phases.get(phase, ([0] * len(buckets), 0.0))
                phases[phase] = [a + b for a, b in zip(before, buckets, strict=True)], sum_s + seconds
        return retries, phases

    # -- inside

    def _made(self) -> CausalLM:
        experts = self.pool.dispatcher(timeout_s=self.timeout_s)
        self._experts.append(experts)
        model = build(self.config, experts, device=self.device).eval()
        model.round_to(self._weight_dtype, self.device)
        return model

    def _load(self, model: CausalLM, version: int) -> None:
        """Raises VersionGone, and StepConflict where it is not known whose steps there are."""
        self._check_line(version)
        shm_state.from_any(self._candidates(), step_of(version), partial(self._load_from, model, step_of(version)))
        self._check_line(version)
        experts = model.experts
        assert isinstance(experts, Dispatcher)
        experts.use(version)

    def _load_from(self, model: CausalLM, step: int, node: str, folder: str) -> None:
        with self._lender.lent(node, folder, step, WEIGHT, self.pool.timeout_s) as found:
            load_values(model, found)

    def _check_line(self, version: int) -> None:
        line = tried(self.pool.service.next_line, TrinityError)
        if isinstance(line, TrinityError):
            raise StepConflict(f"whether version {step_of(version)} is still the run's is not known: {line}")
        if line != line_of(version):
            raise VersionGone(f"the run has gone back since version {step_of(version)}; its steps are others now")

    def _candidates(self) -> Iterator[tuple[str, str]]:
        """Places where a backbone may be: the job may have moved since its place was noted."""
        yield from self._places
        if (decision := self.pool.decided()) is not None:
            self._places = decision.notes["backbone"]
        yield from self._places

    def _keep_up(self) -> None:
        """Have each version that is to be served ready before it is the newest."""
        torch.set_num_threads(1)  # of this thread: passes want the others
        known: int | None = self._good
        while not self._stopped.is_set():
            version = self._view.other_version(known, POLL_S)
            if version is not None and version != known:
                if self._is_ready(version):
                    known = version
                else:
                    self._stopped.wait(AGAIN_S)

    def _is_ready(self, version: int) -> bool:
        if version >= 0 and version not in self._bad and self._pinned is None:
            error = tried(partial(self._models.prepare, version), Exception)  # the edge of this thread
            if error is not None:  # passes go on with the version before
                log.warning("version %d cannot be taken up now: %s", step_of(version), error)
                return False
        with self._guard:
            if version >= 0 and version not in self._bad:
                self._good = version
        return True

    def _holder(self, what: object) -> str:
        return f"{self._me}/{what}"

    def _renew(self) -> None:
        while not self._stopped.wait(LEASE_S / 3):
            if self._pinned is not None:
                self._ask("pin", self._pinned, self._holder("pinned"), LEASE_S)
            for version in list(self._held):
                self._ask("pin", version, self._holder(version), LEASE_S)

    def _ask(self, method: str, *arguments: object) -> None:
        """Ask without waiting: whether a version is there is said by whoever is asked to compute with it."""
        error = tried(partial(self.pool.service.tell, method, *arguments), Unavailable)
        if error is not None:
            log.warning("%s: %s", method, error)
