"""A tiny model's checkpoints for the tests: seeded, with optimizer state that is not zero, and read again to the last bit."""

import json
import shutil

import torch

from trinity.checkpoint import CheckpointWriter, all_experts, open_checkpoint, step_path, write_tensors
from trinity.config import OptimConfig, preset
from trinity.models.afmoe.init import init_weights
from trinity.models.afmoe.model import Afmoe
from trinity.pool.local import local_pool
from trinity.rpc.messages import Load

MODEL = preset("tiny").model_copy(
    update=dict(vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, head_dim=8, num_experts=4,
                sliding_window=6, pad_token_id=None)
)  # fmt: skip


def pool_of(num_shards, load):
    return local_pool(MODEL, load, num_shards=num_shards, optim=OptimConfig(), backend="torch")


def model_and_pool(seed=1, num_shards=2):
    """A backbone and its experts, as after some steps: moments that are not zero, biases too."""
    pool = pool_of(num_shards, Load(seed=seed))
    model = Afmoe(MODEL, pool.dispatcher())
    init_weights(model, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for bias in model.expert_bias.values():
            bias.normal_(std=0.1, generator=rng)
    for shard in pool.transport.shards.values():
        for name, tensor in shard.store.current.tensors.items():
            if not name.endswith("::weight"):
                tensor.normal_(generator=rng)
    return model, pool


def save(target, step, model, pool, tokenizer=None, **state):
    """Everything a trainer saves, in the same way."""
    with CheckpointWriter(target, step) as writer:
        parts = [
            *pool.save(str(writer.folder), 0)(),
            *write_tensors(writer.folder, "model-backbone", model.tensors().items()),
            *write_tensors(writer.folder, "training/backbone", [("x::momentum", torch.arange(7.0))]),
        ]
        return writer.finish(parts, MODEL, tokenizer, {"num_updates": step, "position": step, **state})


def write(out_dir, step=3, seed=1, num_shards=2, tokenizer=None):
    model, pool = model_and_pool(seed, num_shards)
    return model, save(step_path(out_dir, step), step, model, pool, tokenizer)


def contents(path):
    """Every value in a checkpoint, as a trainer, its shards and a server would read them."""
    found = open_checkpoint(path)
    model = Afmoe(found.config, lambda *_: None, device="meta")
    tensors = {name: found.tensor(name, like.shape) for name, like in model.tensors().items()}
    for layer, experts in all_experts(found.config).items():
        tensors |= {f"{layer}.{expert}.{i}": t for expert in experts for i, t in enumerate(found.expert(layer, expert))}
    tensors |= found.training_tensors([name for part in training_parts(found) for name in part["tensors"]])
    has_tokenizer = "tokenizer.json" in found.manifest["files"]
    text = json.dumps([found.config.model_dump(), found.state, found.generation, found.version])
    return tensors, text + (found.tokenizer.to_json() + str(found.tokenizer.chat_template) if has_tokenizer else "")


def training_parts(checkpoint):
    return [entry for file, entry in checkpoint.manifest["files"].items() if file.startswith("training/")]


def same(a, b):
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(t, b[0][name]) for name, t in a[0].items())


def plain(path):
    """The same checkpoint as somebody else would have written it: no manifest."""
    (path / "manifest.json").unlink()
    shutil.rmtree(path / "training")
    index = path / "model.safetensors.index.json"
    edit_json(index, metadata={"total_size": json.loads(index.read_text())["metadata"]["total_size"]})
    return path


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip(path, at=None):
    """Change one bit of a file: of byte `at`, or of the one in its middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)
