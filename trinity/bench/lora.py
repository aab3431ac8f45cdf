"""`trinity bench lora`: a training step of adapters against one of all weights, and the memory that each of them holds.

Decisions: both arms are in one process, with AdamW, begin from one checkpoint, see the same random tokens and take turns, a
step each; since an adapter adds nothing at first, their first losses must agree before any time counts. Memory is counted, not
measured: what the stores hold, two versions of all that takes steps, and the gradients of a step. Processor seconds are for
machines that others use, too.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trinity.bench import models
from trinity.bench.report import Report, Table, alternated, ratio
from trinity.config import Config
from trinity.errors import TrinityError
from trinity.utils.hugepages import keep_freed_memory
from trinity.utils.units import size

if TYPE_CHECKING:
    from trinity.bench.train import Ours
    from trinity.pool.pool import ExpertPool

USUAL: dict[str, Any] = {"preset": "bench", "rounds": 5, "rank": 8, "micro_batch": 8, "seq_len": 256}
QUICK: dict[str, Any] = {"preset": "tiny", "rounds": 1, "rank": 4, "micro_batch": 2, "seq_len": 32}
WHOLE, LORA = "all weights", "adapters"
MAX_DIFFERENCE = 1e-5


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help=f"model (default: {USUAL['preset']}; with --quick tiny)")
    for name, text in (("threads", "of the process (default: all cores)"), ("rounds", "steps of each arm"),
                       ("rank", "of the adapters"), ("micro_batch", "sequences of a step"),
                       ("seq_len", "tokens of a sequence")):  # fmt: skip
        default = f" (default: {USUAL[name]})" if name in USUAL else ""
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=text + default)


def measure(arguments: argparse.Namespace) -> Report:
    import torch

    from trinity.bench.train import Ours, random_text
    from trinity.pool.local import local_pool
    from trinity.rpc.messages import Load

    given = models.filled(arguments, USUAL, QUICK)
    keep_freed_memory()
    torch.set_num_threads(given.threads)
    path = models.checkpoint(models.config_of(given.preset).model, Path(given.out) / f"{given.preset}-float32")
    arms: dict[str, tuple[Ours, ExpertPool]] = {}
    for arm in (WHOLE, LORA):
        config = _config(given, path, arm)
        pool = local_pool(config.model, Load(config.train.init_from, training=False), optim=config.optim)
        arms[arm] = Ours(config, pool, random_text(config, given.rounds + 1)), pool
    losses = {arm: ours.step().loss for arm, (ours, _) in arms.items()}
    if abs(losses[WHOLE] - losses[LORA]) > MAX_DIFFERENCE:
        raise TrinityError(f"the first losses are {losses}: times mean nothing")
    return _report(
        given, arms, alternated({arm: partial(_timed, arms[arm][0]) for arm in arms}, given.rounds, warmup=0)
    )


def _timed(ours: "Ours") -> tuple[float, float]:
    """-> seconds of a step, and those of all processors."""
    began_s = time.process_time()
    return ours.step().seconds, time.process_time() - began_s


def _config(given: argparse.Namespace, path: Path, arm: str) -> Config:
    shape = {"seq_len": given.seq_len, "micro_batch_size": given.micro_batch, "global_batch_size": given.micro_batch}
    train = {**shape, "out_dir": str(Path(given.out) / "lora"), "init_from": str(path.resolve())}
    optim: dict[str, Any] = {"matrices": "adamw", "warmup_steps": 0, "decay": "none"}
    if arm == LORA:
        optim["lora"] = {"rank": given.rank}
    return models.config_of(given.preset, train=train, optim=optim, data={"intra_document_mask": False})


def _report(
    given: argparse.Namespace, arms: "dict[str, tuple[Ours, ExpertPool]]", steps: dict[str, list[tuple[float, float]]]
) -> Report:
    rows, walls = [], {arm: [wall for wall, _ in found] for arm, found in steps.items()}
    used = {arm: [processors for _, processors in found] for arm, found in steps.items()}
    for arm, (ours, pool) in arms.items():
        times = [cell for s in (walls, used) for cell in (statistics.median(s[arm]), ratio(s[arm], s[WHOLE]))]
        experts, per_weight, backbone = _bytes(ours, pool)
        rows.append((arm, *times, size(experts), per_weight, size(backbone)))
    share = f"/ {WHOLE}"
    columns = ("trained", "s/step", share, "processor s", share, "experts", "bytes per weight", "backbone")
    tokens = given.micro_batch * given.seq_len
    title = (
        f"Preset {given.preset} in fp32, AdamW, rank {given.rank}, {tokens:,} tokens a step, {given.threads} threads"
    )
    report = Report("lora", [Table(title, columns, tuple(rows))])
    if given.preset == "bench" and not given.quick:
        report.target(f"step of {LORA} / {WHOLE}", ratio(walls[LORA], walls[WHOLE]), at_most=0.7)
    return report


def _bytes(ours: "Ours", pool: "ExpertPool") -> tuple[int, float, int]:
    """-> bytes of the shards' versions and gradients, the same per weight of an expert, and those of the backbone."""
    shards = list(pool.transport.shards.values())  # type: ignore[attr-defined]  # they are in this process
    stacks = [stack for shard in shards for layer in shard.versions.trained.values() for stack in layer.values()]
    experts = sum(shard.store.num_bytes for shard in shards) + 4 * sum(stack.numel() for stack in stacks)
    model = ours.trainer.config.model
    weights = len(model.moe_layers) * model.num_experts * model.expert_params
    trained = ours.trainer.backbone.trained.values()
    backbone = ours.trainer.backbone.store.num_bytes + 4 * sum(weight.numel() for weight in trained)
    return experts, experts / weights, backbone
