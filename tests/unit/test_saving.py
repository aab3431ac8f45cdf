"""The saver beside the training: whatever prevents a save, somebody hears of it."""

from types import SimpleNamespace

import pytest
import torch

from trinity.config import Config
from trinity.state.versioned_store import Store, Version
from trinity.train.checkpointer import AsyncCheckpointer


def saver_for(out_dir, parts):
    store = Store()
    store.put(Version(0, {"x": store.empty_like(torch.empty(2)).zero_()}, {}))
    store.commit(0)
    backbone = SimpleNamespace(version=0, store=store, values=lambda *_: iter(()), training_state=lambda _: {})
    pool = SimpleNamespace(save=lambda folder, version: parts)
    config = Config.from_tree({"model": "tiny", "train": {"out_dir": str(out_dir)}})
    return AsyncCheckpointer(config, pool, backbone, tokenizer=None)


def test_a_save_that_fails_in_an_unexpected_way_is_not_taken_for_one_that_succeeded(tmp_path):
    def lost():
        raise ConnectionError("the shard's process said something that nobody thought of")

    saver = saver_for(tmp_path, lost)
    saver.begin(1, {})
    assert saver.versions in ((), (0,))
    with pytest.raises(ConnectionError, match="nobody thought of"):
        saver.wait()
    assert saver.versions == ()
    assert not list(tmp_path.iterdir())
