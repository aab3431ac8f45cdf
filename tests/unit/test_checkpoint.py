"""Checkpoints: what is written loads, in transformers too; what is damaged is named and never loaded."""

import hashlib
import threading

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.checkpoint_files import MODEL, contents, flip, model_and_pool, pool_of, save, write
from trinity.checkpoint import CheckpointWriter, list_checkpoints, open_checkpoint, prune, step_path, write_tensors
from trinity.errors import CheckpointError
from trinity.experts.stacked import experts_of, kinds_of, named_matrices
from trinity.models.afmoe.model import Afmoe
from trinity.models.common.attention import PackedAttention, packed_positions
from trinity.pool.local import local_pool
from trinity.rpc.messages import WEIGHT, Load


def logits_of(model, ids):
    with torch.no_grad():
        out = model(ids, packed_positions(1, len(ids)), PackedAttention(MODEL, None, 1, len(ids)))
        return model.logits(out.hidden_TD)


@pytest.fixture
def saved(tmp_path):
    return write(tmp_path)


def test_another_number_of_shards_loads_the_same_model(saved):
    model, path = saved
    source = open_checkpoint(path)
    assert source.config == MODEL
    pool = local_pool(source.config, Load(str(path)), num_shards=3, backend="torch")
    again = Afmoe(MODEL, pool.dispatcher(version=3))
    assert source.load_backbone(again) == 3
    ids = torch.arange(20) % MODEL.vocab_size
    torch.testing.assert_close(logits_of(again, ids), logits_of(model, ids), atol=1e-6, rtol=0)


def test_transformers_loads_it_with_no_missing_or_unexpected_key_and_we_load_what_it_saves(saved, tmp_path):
    from transformers import AfmoeForCausalLM

    model, path = saved
    theirs, info = AfmoeForCausalLM.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(0, MODEL.vocab_size, (24,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs(ids[None]).logits[0]
    torch.testing.assert_close(logits_of(model, ids), want, atol=1e-5, rtol=0)

    theirs.save_pretrained(tmp_path / "hf")
    back = open_checkpoint(tmp_path / "hf")
    assert back.version == 0
    ours = Afmoe(back.config, local_pool(back.config, Load(str(back.path)), backend="torch").dispatcher())
    back.load_backbone(ours)
    torch.testing.assert_close(logits_of(ours, ids), want, atol=1e-5, rtol=0)


def test_large_parts_are_split_and_nothing_is_lost(tmp_path):
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(10)}
    parts = write_tensors(tmp_path, "x", tensors.items(), max_file_bytes=900)
    assert [part.file for part in parts] == [f"x-{i:02d}.safetensors" for i in range(5)]
    read = {k: v for part in parts for k, v in load_file(tmp_path / part.file).items()}
    assert all(torch.equal(read[k], v) for k, v in tensors.items())


def test_unfinished_saves_are_not_listed_and_old_ones_are_pruned(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    writer = CheckpointWriter(step_path(tmp_path, 4), 4)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000001", "step-000002", "step-000003"]
    with pytest.raises(CheckpointError, match="did not finish"):
        open_checkpoint(writer.folder)
    prune(tmp_path, 1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000003"]


def test_a_large_checkpoint_is_measured_ahead_and_hashed_when_it_is_read(saved, monkeypatch):
    model, path = saved
    open_checkpoint(path).verify()
    flip(path / "model-backbone-00.safetensors")
    with pytest.raises(CheckpointError, match="SHA-256"):
        open_checkpoint(path).verify()
    monkeypatch.setattr("trinity.checkpoint.read.HASH_AHEAD_BYTES", 0)
    open_checkpoint(path).verify()
    with pytest.raises(CheckpointError, match="SHA-256"):
        open_checkpoint(path).load_backbone(model)
    (path / "model-backbone-00.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(path).verify()


def test_a_shard_whose_load_fails_holds_no_version(saved, tmp_path):
    _, path = saved
    pool = local_pool(MODEL, Load(str(path)), num_shards=1, backend="torch")
    _, other = write(tmp_path / "other")
    flip(other / "model-experts-shard-1-00.safetensors")
    with pytest.raises(CheckpointError, match="SHA-256"):
        pool.load(Load(str(other)))
    assert pool.versions() == {"shard-0": -1}
    assert pool.load(Load(str(path))) == 3


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_three_shards_write_and_any_number_go_on_with_the_same_bits(tmp_path, num_shards):
    model, pool = model_and_pool(num_shards=3)
    path = save(step_path(tmp_path, 5), 5, model, pool)
    other = pool_of(num_shards, Load(str(path), training=True))
    assert set(other.versions().values()) == {5}
    mine, theirs = state_of(pool), state_of(other)
    assert len(mine) > len(state_of(pool, kinds=(WEIGHT,))) > 0
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert {shard.store.current.notes["num_updates"] for shard in other.transport.shards.values()} == {5}


def state_of(pool, kinds=None):
    """Weights and optimizer state of all shards, or some kinds of them, by the names of a checkpoint."""
    found = [shard.store.current for shard in pool.transport.shards.values()]
    return {
        name: tensor
        for version in found
        for name, tensor in named_matrices(version, MODEL, experts_of(version), kinds or kinds_of(version))
    }


def test_mixed_types_and_views_are_written_bit_for_bit_as_safetensors_reads_them(tmp_path):
    rng = torch.Generator().manual_seed(0)
    made = torch.randn(6, 10, generator=rng)
    tensors = {
        "half": made.bfloat16()[:, :3],
        "transposed": made.mT,
        "one": made[0, 0],
        "none": made[:0],
        "double": made.double(),
        "strided": made[::2, ::3],
        "short": made.half()[0, :3],
    }
    (part,) = write_tensors(tmp_path, "x", tensors.items())
    read = load_file(tmp_path / part.file)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in tensors.items())
    raw = (tmp_path / part.file).read_bytes()
    assert (part.num_bytes, part.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())


def test_saves_in_many_threads_do_not_disturb_each_other(tmp_path):
    """Two of the same step, too: one of them stays, whole."""
    made = {seed: model_and_pool(seed) for seed in (1, 2, 3)}
    known = {seed: contents(save(tmp_path / f"known-{seed}", 7, *what)) for seed, what in made.items()}
    run, failed = tmp_path / "run", []

    def work(seed):
        try:
            for _ in range(5):
                save(step_path(run, 7), 7, *made[seed])
                save(step_path(run, 10 + seed), 10 + seed, *made[seed])
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert sorted(p.name for p in run.iterdir()) == [f"step-{step:06d}" for step in (7, 11, 12, 13)]
    assert any(
        all(torch.equal(t, want[0][n]) for n, t in contents(step_path(run, 7))[0].items()) for want in known.values()
    )


def test_an_exception_in_the_block_abandons_the_save(tmp_path):
    def save_and_fail():
        with CheckpointWriter(step_path(tmp_path, 1), 1) as writer:
            write_tensors(writer.folder, "x", [("a", torch.zeros(3))])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_still_writes_for_a_dead_save_is_told(tmp_path):
    writer = CheckpointWriter(step_path(tmp_path, 1), 1)
    folder = str(writer.folder)
    del writer
    CheckpointWriter(step_path(tmp_path, 1), 1)
    with pytest.raises(CheckpointError, match=r"cannot write .*: No such file or directory"):
        write_tensors(folder, "x", [("a", torch.zeros(3))])
