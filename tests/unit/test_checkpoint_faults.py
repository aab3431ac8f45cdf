"""Savers that die and disks that fail (F5, F6): what can be loaded is whole, and what is not whole is named."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.checkpoint_files import contents, flip, model_and_pool, same, save, write
from trinity.checkpoint import list_checkpoints, open_checkpoint, step_path
from trinity.errors import CheckpointError
from trinity.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


def test_a_saver_killed_at_any_file_operation_leaves_whole_checkpoints_and_the_next_save_works(tmp_path):
    program = Path(__file__).with_name("killed_saves.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, program, tmp_path], capture_output=True, text=True, env=environment, timeout=110
    )
    assert done.returncode == 0, done.stderr
    replaces, alone = json.loads(done.stdout)
    assert replaces.count("os.rename") == 4  # the old one away, the new one here, two deletions
    assert alone.count("os.rename") == 3
    for operations in (replaces, alone):
        assert {"os.mkdir", "open", "fsync", "os.rename", "os.remove", "os.rmdir"} == set(operations)
        assert operations.count("open") > 10
    for path in tmp_path.glob("known-*/step-*"):
        open_checkpoint(path).verify()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A checkpoint with everything in it that there can be, and what it holds."""
    tokenizer = Tokenizer.train(iter(["some text"]), 300)
    _, path = write(tmp_path_factory.mktemp("pristine"), tokenizer=tokenizer)
    return path, contents(path)


FILES = (
    "config.json", "generation_config.json", "manifest.json", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "model-backbone-00.safetensors",
    "model-experts-shard-0-00.safetensors", "model-experts-shard-1-00.safetensors", "training/state.json",
    "training/backbone-00.safetensors", "training/experts-shard-0-00.safetensors",
    "training/experts-shard-1-00.safetensors",
)  # fmt: skip
DAMAGES = {
    "first byte": lambda path: flip(path, 0),
    "middle byte": flip,
    "last byte": lambda path: flip(path, -1),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a byte long": lambda path: os.truncate(path, path.stat().st_size + 1),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def test_the_list_of_files_is_complete(pristine):
    path, _ = pristine
    assert sorted(FILES) == sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_named_and_never_loaded(pristine, tmp_path, file, damage):
    path = shutil.copytree(pristine[0], tmp_path / "step-000003")
    DAMAGES[damage](path / file)
    if (file, damage) == ("manifest.json", "a byte short"):  # that was the end of the line: it says the same
        assert same(contents(path), pristine[1])
        return
    for read in (contents, lambda path: open_checkpoint(path).verify()):
        with pytest.raises(CheckpointError, match=f"{path}/{file}"):
            read(path)


def test_a_bit_in_the_manifest_changes_nothing_that_is_read(pristine, tmp_path):
    path, before = shutil.copytree(pristine[0], tmp_path / "step-000003"), pristine[1]
    text = (path / "manifest.json").read_bytes()
    for at in range(0, len(text), 41):
        flip(path / "manifest.json", at)
        with contextlib.suppress(CheckpointError):
            assert same(contents(path), before)  # it was a blank between two words
        (path / "manifest.json").write_bytes(text)


@contextlib.contextmanager
def small_files(num_bytes):
    """No file of this process may grow beyond that: what a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [0, 200, 5000, 30_000])
def test_a_file_that_cannot_grow_ends_the_save_and_leaves_the_checkpoint_before(tmp_path, num_bytes):
    model, pool = model_and_pool()
    first = save(step_path(tmp_path, 1), 1, model, pool)
    before = contents(first)
    with small_files(num_bytes), pytest.raises(CheckpointError, match=r"cannot write .*step-000001.*: File too large"):
        save(step_path(tmp_path, 1), 2, model, pool)
    assert same(contents(first), before)
    assert os.listdir(tmp_path) == ["step-000001"]
    assert open_checkpoint(save(step_path(tmp_path, 1), 2, model, pool)).version == 2


@pytest.fixture
def disk(tmp_path):
    """-> mount(options): a file system of memory on a folder, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "trinity-test", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this process may not mount a file system")
        return folder

    yield mount
    if shutil.which("umount"):
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)


def test_a_full_disk_ends_the_save_and_leaves_the_checkpoint_before(disk):
    model, pool = model_and_pool()
    folder = disk("size=2m")
    before = contents(save(step_path(folder, 1), 1, model, pool))
    fill(folder / "other", leave_bytes=300_000)
    with pytest.raises(CheckpointError, match=r"cannot write .*step-000002.*: No space left on device"):
        save(step_path(folder, 2), 2, model, pool)
    assert sorted(os.listdir(folder)) == ["other", "step-000001"]
    assert same(contents(step_path(folder, 1)), before)
    (folder / "other").unlink()
    save(step_path(folder, 2), 2, model, pool)
    assert len(list_checkpoints(folder)) == 2


def fill(path, leave_bytes):
    free = os.statvfs(path.parent)
    path.write_bytes(bytes(free.f_bavail * free.f_frsize - leave_bytes))


def test_a_read_only_disk_is_read_and_not_written(disk):
    model, pool = model_and_pool()
    folder = disk("size=2m")
    before = contents(save(step_path(folder, 1), 1, model, pool))
    disk("size=2m,remount,ro")
    with pytest.raises(CheckpointError, match=r"cannot write .*step-000002.*: Read-only file system"):
        save(step_path(folder, 2), 2, model, pool)
    assert same(contents(list_checkpoints(folder)[0]), before)


@pytest.mark.parametrize("folder", ["/proc/self/run", "/dev/null/run", "{tmp}/file/run"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, folder):
    (tmp_path / "file").touch()
    target = Path(folder.format(tmp=tmp_path)) / "step-000001"
    with pytest.raises(CheckpointError, match=f"cannot write {target.parent}"):
        save(target, 1, *model_and_pool())
