"""`trinity bench load`: its random checkpoint is as the Hub has them, and memory is counted over a family of processes."""

import subprocess
import sys

import pytest
import torch

from trinity.bench import load, loaders
from trinity.bench.random_weights import BLOCK, _values
from trinity.checkpoint import open_checkpoint
from trinity.config import preset
from trinity.errors import Unavailable
from trinity.llm import LLM
from trinity.models.registry import weight_bytes


def test_the_random_checkpoint_is_whole_and_answers(tmp_path):
    model = preset("tiny").model_copy(update={"dtype": "bfloat16"})
    num_bytes = load.written(model, tmp_path)
    assert num_bytes == pytest.approx(sum(weight_bytes(model)), rel=0.05)
    assert not open_checkpoint(tmp_path).manifest
    (found,) = LLM(tmp_path, max_model_len=64, device="cpu").generate([[20, 21]])
    assert found.token_ids
    written_at = (tmp_path / "config.json").stat().st_mtime_ns
    load.written(model, tmp_path)
    assert (tmp_path / "config.json").stat().st_mtime_ns == written_at


def test_values_differ_from_tensor_to_tensor_and_may_be_more_than_the_block():
    block = torch.arange(BLOCK)
    first, second = (_values(block, torch.Size((4, 5)), place) for place in (0, 1_299_709))
    assert first.shape == (4, 5)
    assert not torch.equal(first, second)
    assert _values(block, torch.Size((BLOCK + 3,)), 9)[-3:].tolist() == [0, 1, 2]


CHILD = "x = bytearray(b'1') * (200 << 20); print('up', flush=True); import sys; sys.stdin.read()"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"


def test_memory_of_a_family_counts_children_once():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as it:
        assert it.stdout.readline() == "up\n"
        found = loaders.family(it.pid)
        total = sum(map(loaders.own_bytes, found))
        it.stdin.close()
    assert len(found) == 2
    assert 200 << 20 <= total < 300 << 20
    assert loaders.own_bytes(it.pid) == 0


def test_a_loader_that_fails_is_said(tmp_path):
    with pytest.raises(Unavailable, match="loads as llm ended early"):
        loaders.watched("llm", tmp_path / "nothing")
