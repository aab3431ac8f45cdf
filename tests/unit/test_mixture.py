"""Mixtures: shares of tokens at any time, each source in its own order, one step whoever computes it, and refusals by name."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_chats import TOKENIZER, rows_of
from tests.unit.test_trainer import config_for, texts, trainer_for  # noqa: F401  a fixture
from trinity.config import Config, Sequences, TrainConfig
from trinity.data.dataset import IGNORE, PackedDataset, Source
from trinity.data.mixture import BLOCK, Mixture
from trinity.errors import ConfigError, DataError
from trinity.observability.train_log import TrainLog, read_rows
from trinity.preparing import prepare_stages
from trinity.stages import read_stages
from trinity.train.loss import token_logprobs


def packed(num, first, seed=0, seq_len=4):
    """A source of so many sequences, whose tokens are numbered from `first` on."""
    tokens = np.arange(first, first + num * seq_len + 1, dtype=np.uint32)
    return PackedDataset(SimpleNamespace(tokens=tokens, starts_N=np.array([0, len(tokens)]), content=""), seq_len, seed)


@st.composite
def mixtures(draw):
    weights = draw(st.lists(st.floats(0.01, 1), min_size=1, max_size=4))
    datasets = [packed(draw(st.integers(1, 900)), 10_000 * n, draw(st.integers(0, 9))) for n in range(len(weights))]
    sources = [Source(str(n), w / sum(weights), d) for n, (w, d) in enumerate(zip(weights, datasets, strict=True))]
    return Mixture(sources, 4, draw(st.integers(0, 9)))


@settings(deadline=None, max_examples=8)
@given(mixtures())
def test_each_block_has_the_shares_and_each_source_its_own_order(mixture):
    at_P = np.arange(2 * BLOCK)
    sources_P, _ = mixture._places(at_P)
    exact = np.array([source.share for source in mixture.sources]) * BLOCK
    for block in sources_P.reshape(2, BLOCK):
        assert np.bincount(block, minlength=len(exact)).tolist() == list(mixture.num_per_block)
    assert (np.abs(mixture.num_per_block - exact) < 1).all(), "the largest remainders are less than one away"
    firsts = mixture.take(at_P).ids_BS[:, 0].numpy()
    for number, source in enumerate(mixture.sources):
        mine = firsts[sources_P == number]
        own = source.dataset.take(source.dataset.indices(np.arange(len(mine))))
        assert mine.tolist() == own.ids_BS[:, 0].tolist(), "none is left out, none comes twice"


@settings(deadline=None, max_examples=25)
@given(mixtures(), st.integers(0, 5000), st.sampled_from([(1, 1), (2, 3), (4, 1)]))
def test_a_step_is_the_same_for_any_number_of_workers_and_without_what_came_before(mixture, step, shape):
    world, size = shape
    total = world * size * 2
    alone = mixture.batch(Sequences.nth(step, total), 0, 1, 0, total)
    fresh = Mixture(mixture.sources, mixture.seq_len, mixture.seed)
    parts = [
        fresh.batch(Sequences.nth(step, total), rank, world, micro, size) for micro in range(2) for rank in range(world)
    ]
    assert all(torch.equal(torch.cat(found), want) for found, want in zip(zip(*parts, strict=True), alone, strict=True))
    assert sum(mixture.source_tokens(Sequences.nth(step, total)).values()) == alone.ids_BS.numel()


@pytest.mark.parametrize("ramp", [(), ({"steps": 30, "global_batch_size": 2}, {"steps": 50, "global_batch_size": 5})])
@pytest.mark.parametrize("epochs", [0.5, 1, 2.25])
def test_a_bound_on_epochs_allows_the_steps_that_it_says(epochs, ramp):
    def steps_of(steps):
        return TrainConfig(steps=steps, global_batch_size=7, micro_batch_size=1, batch_ramp=ramp)

    small = packed(1000, 0)
    mixture = Mixture([Source("web", 0.7, packed(500, 9000)), Source("book", 0.3, small, epochs)], 4, 1)
    with pytest.raises(
        ConfigError, match=r"source 'book' would be read [0-9.e+]+ times in 9,999 steps; its epochs"
    ) as refused:
        mixture.check(steps_of(9999))
    allowed = int(refused.value.message.split("allow ")[1].split(" steps")[0].replace(",", ""))
    mixture.check(steps_of(allowed))
    taken = map(steps_of(allowed).sequences_of, range(allowed))
    read = sum(mixture.source_tokens(step)["book"] for step in taken) // 4
    assert epochs * 1000 - 7 < read <= epochs * 1000
    with pytest.raises(ConfigError, match=r"lower train\.steps, raise epochs, or give it less weight"):
        mixture.check(steps_of(allowed + 1))


def test_a_weight_that_is_no_sequence_of_a_block_is_named():
    mixture = Mixture([Source("a", 1 - 1e-5, packed(9, 0)), Source("b", 1e-5, packed(9, 900))], 4, 0)
    with pytest.raises(ConfigError, match=r"source 'b' has 1e-05 of the weights, less than one of 4,096 sequences"):
        mixture.check(TrainConfig())


# -- in a run


@pytest.fixture(scope="module")
def files(texts, tmp_path_factory):  # noqa: F811
    """Two sources of text, one of chats, and a tokenizer that knows a chat template."""
    folder = tmp_path_factory.mktemp("sources")
    TOKENIZER.save(folder / "tokenizer")
    for n, text in enumerate(sorted(texts.glob("*.txt"))):
        (folder / ("web" if n % 3 else "book")).mkdir(exist_ok=True)
        (folder / ("web" if n % 3 else "book") / text.name).write_text(text.read_text())
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(120)))
    return folder


def sources(files, *weights, **chats):
    found = [{"train": str(files / name), "weight": w} for name, w in zip(("web", "book"), weights, strict=False)]
    return [*found, {"train": str(files / "chats.jsonl"), "format": "chats", **chats}] if chats else found


def mixed(files, out, *weights, chats=None, **train):
    config = config_for(files, out, eval_sequences=8, **train)
    data = {"train": (), "sources": sources(files, *weights, **(chats or {})), "tokenizer": str(files / "tokenizer")}
    return config.replace(data=data, model={"vocab_size": 400})


def test_one_source_is_the_short_form(files, tmp_path):
    one = trainer_for(mixed(files, tmp_path / "one", 5.0))
    data = {"train": [str(files / "web")], "sources": ()}
    short = trainer_for(mixed(files, tmp_path / "short", 5.0).replace(data=data))
    for step in (0, 7, 3000):
        assert all(
            map(torch.equal, *(each.data.train.batch(Sequences.nth(step, 4), 0, 1, 0, 4) for each in (one, short)))
        )
    assert one.step().loss == short.step().loss
    assert one.evaluate() == short.evaluate()


def test_text_and_chats_are_one_step_whatever_the_micro_batches(files, tmp_path):
    """The loss is that of each document alone; balance loss and gradient do not depend on who shares a micro-batch."""
    found = []
    for micro in (1, 2, 4, 8):
        config = mixed(
            files, tmp_path / str(micro), 2, 1, chats={"weight": 2}, micro_batch_size=micro, global_batch_size=8
        )
        trainer = trainer_for(config.replace(train={"seq_len": 128}, optim={"balance_loss": 0.1}))
        metrics = trainer.step()
        found.append([metrics.loss, metrics.balance_loss, metrics.grad_norm])
        assert set(metrics.source_tokens) == {"web", "book", "chats"}
        assert sum(metrics.source_tokens.values()) == metrics.tokens
    assert np.allclose(found, found[0], rtol=1e-5)
    trainer = trainer_for(config.replace(train={"seq_len": 128, "out_dir": str(tmp_path / "alone")}))
    trainer.dispatcher.use(0)
    nll, num = 0.0, 0
    batch = trainer.data.train.batch(Sequences.nth(0, 8), 0, 1, 0, 8)
    assert batch.ids_BS.shape[0] == 1
    for doc in batch.docs_BS.unique():
        mine = batch.docs_BS[0] == doc
        targets = batch.targets_BS[:, mine]
        ids = torch.cat([batch.ids_BS[:, mine], targets[:, -1:].clamp_min(0)], 1)
        kept = targets != IGNORE
        assert torch.equal(ids[:, 1:][kept], targets[kept])
        nll -= token_logprobs(trainer.model, ids)[kept].sum().item()
        num += int(kept.sum())
    assert found[0][0] == pytest.approx(nll / num, rel=1e-5)


def test_shares_are_of_tokens_where_sequences_are_not_full(files, tmp_path):
    config = mixed(files, tmp_path, 1, chats={"weight": 1}).replace(train={"seq_len": 40})
    dataset = trainer_for(config).data.train
    assert dataset.sources[1].dataset.fill < 0.97
    tokens = Counter()
    for step in range(4):
        tokens.update(dataset.source_tokens(Sequences.nth(step, BLOCK)))
    assert tokens["chats"] / tokens.total() == pytest.approx(0.5, abs=0.005)


def test_the_log_has_tokens_and_losses_of_each_source(files, tmp_path):
    trainer = trainer_for(mixed(files, tmp_path, 3, 1))
    log = TrainLog(tmp_path, 6)
    trainer.logs = [log]
    steps = [trainer.step() for _ in range(2)]
    loss = trainer.evaluate()
    log.close()
    *rows, val = read_rows(tmp_path / "metrics.jsonl")
    assert [row["source_tokens"] for row in rows] == [each.source_tokens for each in steps]
    assert all(sum(each.source_tokens.values()) == each.tokens for each in steps)
    losses = val["val_losses"]
    assert losses.keys() == {"web", "book"}
    assert val["val_loss"] == loss == pytest.approx(0.75 * losses["web"] + 0.25 * losses["book"])
    assert losses["web"] != losses["book"]


def test_a_run_resumes_bitwise_and_not_with_another_mixture(files, tmp_path):
    whole = trainer_for(mixed(files, tmp_path / "whole", 3, 1))
    want = [whole.step().loss for _ in range(4)]
    first = trainer_for(mixed(files, tmp_path / "cut", 3, 1))
    found = [first.step().loss for _ in range(2)]
    checkpoint = first.save()
    second = trainer_for(mixed(files, tmp_path / "cut", 6, 2))
    assert found + [second.step().loss for _ in range(2)] == want
    for changed, says in (
        (mixed(files, tmp_path / "cut", 1, 1), r"web.weight is 0.75, not 0.5; web.in_block is 3072, not 2048"),
        (mixed(files, tmp_path / "cut", 3), r"sources is 'web, book', not 'web'"),
        (
            config_for(files / "web", tmp_path / "cut").replace(model={"vocab_size": 400}),
            "sources is 'web, book', not None",
        ),
    ):
        with pytest.raises(ConfigError, match=f"other data or batches.*{says}"):
            trainer_for(changed)
    stage = {"out_dir": str(tmp_path / "next"), "init_from": str(checkpoint), "carry": "all"}
    assert trainer_for(mixed(files, tmp_path, 1, 1).replace(train=stage)).version == 2, "another stage may have another"


def test_a_packing_that_is_new_is_another_order(texts, tmp_path):  # noqa: F811
    trainer = trainer_for(config_for(texts, tmp_path))
    trainer.step()
    trainer.save()
    with pytest.raises(ConfigError, match="rsdb_documents is None, not 256"):
        trainer_for(config_for(texts, tmp_path).replace(data={"packing": "rsdb"}))


def test_a_stage_has_a_mixture_in_the_place_of_files_and_files_in_that_of_a_mixture(files, tmp_path):
    base = config_for(files / "web", tmp_path).model_dump(mode="json", exclude={"serve", "cluster"})
    base["data"]["val"] = [str(files / "book")]
    mixture = {"name": "b", "data": {"sources": sources(files, 1, 2)}}
    tree = {**base, "stages": [{"name": "a"}, mixture, {"name": "c", "data": {"train": str(files / "book")}}]}
    first, second, third = (stage.config.data for stage in read_stages(tree))
    assert [part.train[0] for part in second.parts] == [str(files / name) for name in ("web", "book")]
    assert (first.sources, third.sources, third.train) == ((), (), (str(files / "book"),))
    assert second.described.startswith(f"web (33.3%: {files / 'web'}); book (66.7%")
    base["data"] = {"sources": sources(files, 1)}
    tree = {**base, "stages": [{"name": "a", "data": {"train": "stdlib"}}]}
    assert read_stages(tree)[0].config.data.sources == ()
    mixture["data"]["sources"][1]["train"] = "/nowhere.jsonl"
    with pytest.raises(DataError, match=r"no text file matches '/nowhere\.jsonl'"):
        next(prepare_stages(read_stages({**base, "stages": [mixture]}), join=int))


ONE = {"train": "a.txt"}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"sources": [{**ONE, "weight": 0}, {"train": "b", "weight": 0}]}, "the weights of all sources sum to 0"),
        ({"sources": [{**ONE, "weight": -1}]}, r"data.sources.0.weight: Input should be greater than or equal to 0"),
        ({"sources": [{**ONE, "weight": float("nan")}]}, r"data.sources.0.weight: Input should be a finite number"),
        ({"sources": [{**ONE, "weight": 1e308}, {"train": "b", "weight": 1e308}]}, "sum to inf"),
        ({"sources": [ONE, {"train": "x/a.jsonl.gz"}]}, "two sources are called 'a'"),
        ({"sources": [ONE], "train": "b.txt"}, "sources stand in the place of train and val"),
        ({"sources": [ONE], "val": "b.txt"}, "sources stand in the place of train and val"),
        ({"sources": [{**ONE, "weights": 1}]}, "unknown setting 'data.sources.0.weights'; did you mean"),
        ({"sources": [{"weight": 1}]}, "data.sources.0.train: Field required"),
        ({"sources": [{"train": []}]}, "data.sources.0.train: Tuple should have at least 1 item"),
        ({"sources": [{**ONE, "name": "../x"}]}, "data.sources.0.name: a source's name has 1 to 64 letters"),
        ({"sources": [{**ONE, "epochs": 0}]}, "data.sources.0.epochs: Input should be greater than 0"),
        (
            {"sources": [{**ONE, "format": "chats"}], "intra_document_mask": False},
            "intra_document_mask false goes with",
        ),
    ],
)
def test_sources_that_cannot_be_are_refused_by_name(data, says):
    with pytest.raises(ConfigError, match=says):
        Config.from_tree({"model": "tiny", "data": data})


def test_a_source_that_is_missing_or_empty_is_named_before_a_step(files, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for name, says in (("nowhere.txt", "no text file matches"), ("empty.txt", "every document is empty")):
        config = mixed(files, tmp_path / "run", 1)
        bad = [*sources(files, 1), {"name": "mine", "train": str(tmp_path / name)}]
        with pytest.raises(DataError, match=f"source 'mine': .*{says}"):
            trainer_for(config.replace(data={"sources": bad}))


def test_a_bound_on_epochs_is_checked_before_a_step(files, tmp_path):
    config = mixed(files, tmp_path, 1, steps=10**6)
    bound = [{**each, "epochs": 3} for each in sources(files, 1)]
    with pytest.raises(
        ConfigError, match=r"source 'web' would be read .* times in 1,000,000 steps; its epochs 3 allow"
    ):
        trainer_for(config.replace(data={"sources": bound}))
