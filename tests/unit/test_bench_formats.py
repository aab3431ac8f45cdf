"""`trinity bench formats`: what it says of a form is so."""

import pytest
import torch

from tests.unit.checkpoint_files import MODEL, plain, write
from trinity.bench import formats
from trinity.checkpoint import open_checkpoint
from trinity.errors import ConfigError
from trinity.text.tokenizer import Tokenizer


def test_scores_grow_with_what_is_lost_and_are_nothing_where_nothing_is(tmp_path):
    source = open_checkpoint(plain(write(tmp_path)[1]))
    ids_BS = torch.randint(0, MODEL.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    arms = {arm: formats._scores(model(), ids_BS, as_is) for as_is in [formats._loaded(source, None)]
            for arm, model in formats._arms(source, as_is)}  # fmt: skip
    same = arms.pop("as it is")
    assert (same.kl, same.kl_p99, same.same_token) == (0, 0, 1)
    rounded = {f"{what} {name}" for what in ("experts", "backbone", "both") for name in formats.DTYPES}
    assert set(arms) == {*rounded, "weights int8", "weights fp8"}
    assert 0 < arms["experts bfloat16"].kl < arms["experts int8"].kl < arms["experts nvfp4"].kl
    assert arms["experts int8"].kl < arms["weights int8"].kl
    assert 0 < arms["backbone bfloat16"].kl < arms["backbone int8"].kl
    assert all(abs(each.perplexity / same.perplexity - 1) < 0.2 for each in arms.values())


def test_windows_are_of_all_the_text(tmp_path):
    (tmp_path / "a.py").write_text("def f(x): return x + 1\n" * 50)
    tokenizer = Tokenizer.train(iter([(tmp_path / "a.py").read_text()]), 300)
    source = type("Source", (), {"tokenizer": tokenizer})()
    ids = tokenizer.encode((tmp_path / "a.py").read_text())
    found = formats._windows(source, tmp_path, 4, 8)
    assert found[0].tolist() == ids[:8]
    assert found.shape == (4, 8)
    assert all(row in [ids[i : i + 8] for i in range(len(ids))] for row in found.tolist())
    with pytest.raises(ConfigError, match="name more text"):
        formats._windows(source, tmp_path, 400, 80)
