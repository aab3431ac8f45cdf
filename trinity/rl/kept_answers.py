"""Answers on the disk that steps to come will learn from, and which weights were promised to draw them.

    000012.0of2.npz     the answers of the step at position 12 that worker 0 of 2 drew, whole or not there
    promised.json       by position, the version of the weights that its answers come from

Decisions: in the run's folder, which all workers see. A promise is written before anything is drawn. What is damaged, of other
settings or of another number of workers counts as not there: it is drawn again.
"""

import io
import json
import logging
import math
import os
import re
import secrets
import zipfile
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trinity.rl.judges import Verdict
from trinity.rl.policy import Judged
from trinity.rl.rollout import Sample
from trinity.utils.trying import tried

log = logging.getLogger(__name__)
PROMISED, SUFFIX = "promised.json", ".npz"
DAMAGED = (OSError, ValueError, KeyError, zipfile.BadZipFile)


class KeptAnswers:
    """A worker's own. `facts` stand for the settings that answers depend on."""

    def __init__(self, folder: Path, facts: str, rank: int, world: int):
        self.folder, self.facts, self.rank, self.world = folder, facts, rank, world

    def promised(self) -> dict[int, int]:
        """Version by position; empty where nobody has promised anything."""
        found = tried(lambda: json.loads((self.folder / PROMISED).read_text()), *DAMAGED)
        return {} if isinstance(found, Exception) else {int(position): version for position, version in found.items()}

    def promise(self, promises: Mapping[int, int], anew: int) -> None:
        """Note them, by worker 0; what there was at the position that is drawn `anew` is not read any more."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file(anew).unlink(missing_ok=True)
        if self.rank == 0:
            said = tried(partial(_replace, self.folder / PROMISED, json.dumps(promises).encode()), OSError)
            self._say(said, anew)

    def write(self, position: int, version: int, verdict: Verdict) -> None:
        """Keep them. Without room on the disk that is said, and only a kill costs anything."""
        about = {"facts": self.facts, "version": version, "uniform": verdict.num_uniform}
        pairs = enumerate(zip(verdict.judged, verdict.rewards, strict=True))
        tensors = {f"{at:06d}.{name}": tensor for at, each in pairs for name, tensor in _tensors(*each).items()}
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        content = io.BytesIO()
        np.savez(content, about=np.array(json.dumps(about)), **arrays)
        self._say(tried(partial(_replace, self._file(position), content.getvalue()), OSError), position)

    def read(self, position: int) -> tuple[int, Verdict] | None:
        """Answers of a step that were kept, and the version that they come from; None where they were not."""
        found = tried(partial(self._read, position), *DAMAGED)
        return None if isinstance(found, Exception) else found

    def prune(self, wanted: Collection[int]) -> None:
        """Drop all workers' but those of these positions; by worker 0."""
        for path in self.folder.glob(f"*{SUFFIX}") if self.rank == 0 else ():
            if (name := re.match(r"(\d+)\.", path.name)) and int(name[1]) not in wanted:
                path.unlink(missing_ok=True)

    def _file(self, position: int) -> Path:
        return self.folder / f"{position:06d}.{self.rank}of{self.world}{SUFFIX}"

    def _say(self, error: OSError | None, position: int) -> None:
        if error is not None:
            log.warning("the answers of step %d are in memory alone: %s", position + 1, error)

    def _read(self, position: int) -> tuple[int, Verdict] | None:
        with np.load(self._file(position)) as file:
            about = json.loads(str(file["about"]))
            if about["facts"] != self.facts:
                return None
            found: dict[str, dict[str, Tensor]] = {}
            for name in (name for name in file.files if name != "about"):
                at, _, what = name.partition(".")
                found.setdefault(at, {})[what] = torch.from_numpy(file[name])
        pairs = [_judged(found[at]) for at in sorted(found)]
        verdict = Verdict([judged for judged, _ in pairs], [reward for _, reward in pairs], about["uniform"])
        return about["version"], verdict


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole, or not at all."""
    scratch = path.with_name(f".{secrets.token_hex(4)}")
    try:
        with scratch.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        scratch.rename(path)
    finally:
        scratch.unlink(missing_ok=True)


def _tensors(judged: Judged, reward: float | None) -> dict[str, Tensor]:
    sample = judged.sample
    found = {
        "prompt_ids": torch.tensor(sample.prompt_ids),
        "token_ids": torch.tensor(sample.token_ids),
        "versions": torch.tensor(sample.versions),
        "logprobs_N": sample.logprobs_N,
        "drawn_N": sample.drawn_N,
        "experts_TLK": sample.experts_TLK,
        "is_own_N": sample.is_own_N,
        "advantage": torch.as_tensor(judged.advantage),
        "reference_T": judged.reference_T,
        "counts": torch.tensor([judged.counts, sample.finish_reason == "length", sample.num_turns]),
        "reward": torch.tensor(math.nan if reward is None else reward, dtype=torch.float64),
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _judged(found: Mapping[str, Tensor]) -> tuple[Judged, float | None]:
    counts, is_cut, num_turns = found["counts"].tolist()
    reward = float(found["reward"])
    sample = Sample(
        prompt_ids=tuple(found["prompt_ids"].tolist()),
        token_ids=tuple(found["token_ids"].tolist()),
        text="",  # it was judged already
        finish_reason="length" if is_cut else "stop",
        logprobs_N=found["logprobs_N"],
        drawn_N=found["drawn_N"],
        versions=tuple(found["versions"].tolist()),
        experts_TLK=found["experts_TLK"],
        is_own_N=found.get("is_own_N"),
        num_turns=num_turns,
    )
    known = None if math.isnan(reward) else reward
    return Judged(sample, found["advantage"], bool(counts), found.get("reference_T")), known
