"""Models by their names on the Hub: the real library against a Hub on loopback (tests/hub.py)."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch

from tests.hub import TOKEN, Repo, running
from tests.unit.checkpoint_files import MODEL, plain, write
from trinity import LLM
from trinity.checkpoint import hub, located, open_checkpoint, small_files, title_of
from trinity.cli import main
from trinity.engine.request import SamplingParams
from trinity.errors import CheckpointError
from trinity.launch import load
from trinity.text.tokenizer import Tokenizer

NAME = "acme/tiny"
GREEDY = SamplingParams(max_tokens=8, temperature=0)
WORDS = ["some words to train a tokenizer on, in no language"]
OTHERS = ("pytorch_model.bin", "model.fp16.safetensors", "tiny.gguf", "README.md", "modeling_tiny.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as somebody else has uploaded it: shards, and what nobody here needs."""
    tokenizer = Tokenizer.train(iter(WORDS), 300)
    model = MODEL.model_copy(update={"vocab_size": 320})
    path = plain(write(tmp_path_factory.mktemp("model"), num_shards=3)[1])
    assert model.vocab_size > tokenizer.vocab_size
    tokenizer.save(path)
    for other in OTHERS:
        (path / other).write_bytes(b"not to be fetched")
    return path


@pytest.fixture
def there(folder, tmp_path, monkeypatch):
    """The Hub with the model, and an empty cache here; in a folder that has neither."""
    from huggingface_hub import constants

    with running() as server:
        server.repos[NAME] = Repo()
        server.repos[NAME].push(folder)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "")
        use_cache(monkeypatch, tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        yield server


def use_cache(monkeypatch, path):
    """As a process on another node, with a cache of its own."""
    from huggingface_hub import constants

    path.mkdir(exist_ok=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
    hub._snapshot.cache_clear()


def test_a_name_is_the_folder_that_was_uploaded(there, folder):
    source = located(NAME)
    assert source == f"{NAME}@{there.repos[NAME].commits[0][0]}"
    found, here = open_checkpoint(source), open_checkpoint(folder)
    assert found.config == here.config
    assert found.weight_map == here.weight_map
    found.fetch()
    for key in here.weight_map:
        assert torch.equal(found.tensor(key), here.tensor(key))
    assert found.tokenizer.to_json() == here.tokenizer.to_json()
    wanted = {p.name for p in folder.iterdir() if p.is_file()} - set(OTHERS)
    assert sorted(there.fetched()) == sorted(wanted), "each file that is needed once, and no other"


def test_a_commit_is_asked_for_once_and_read_by_all(there, folder, tmp_path):
    first = located(NAME)
    newer = shutil.copytree(folder, tmp_path / "newer")
    (newer / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    there.repos[NAME].push(newer)
    assert open_checkpoint(first).config.eos_token_id == open_checkpoint(folder).config.eos_token_id
    assert located(NAME) != first
    assert open_checkpoint(NAME).config.eos_token_id == 7
    there.requests.clear()
    open_checkpoint(first).fetch()
    hub._snapshot.cache_clear()
    open_checkpoint(first).fetch()
    assert all("/resolve/" in path for _, path in there.requests), "a commit's files are listed once for all processes"


def test_a_tag_and_a_commit_are_revisions(there):
    commit = there.repos[NAME].commits[0][0]
    there.repos[NAME].tags["v1"] = commit
    assert located(f"{NAME}@v1") == located(f"{NAME}@{commit}") == f"{NAME}@{commit}"


def test_a_node_fetches_the_files_of_its_own_experts(there, folder):
    source = located(NAME)
    here = open_checkpoint(folder)
    layer, mine = MODEL.moe_layers[0], (0,)
    files = {
        here.weight_map[f"model.layers.{layer}.mlp.experts.0.{p}.weight"] for p in ("gate_proj", "up_proj", "down_proj")
    }
    assert files != set(here.weight_map.values())
    open_checkpoint(source).fetch({layer: mine})
    assert {file for file in there.fetched() if file.endswith(".safetensors")} == files
    for mine, theirs in zip(open_checkpoint(source).expert(layer, 0), here.expert(layer, 0), strict=True):
        assert torch.equal(mine, theirs)
    open_checkpoint(source).tensor("model.embed_tokens.weight")  # a file more, when it is read
    assert {file for file in there.fetched() if file.endswith(".safetensors")} == files | {
        here.weight_map["model.embed_tokens.weight"]
    }


def test_the_experts_of_a_pool_come_by_name(there, folder):
    from trinity.pool.local import local_pool
    from trinity.rpc.messages import Load

    pool = local_pool(MODEL, Load(located(NAME), training=False), num_shards=2, backend="reference")
    same = local_pool(MODEL, Load(str(folder), training=False), num_shards=2, backend="reference")
    pairs = zip(pool.transport.shards.values(), same.transport.shards.values(), strict=True)
    for mine, theirs in ((a.store.current.tensors, b.store.current.tensors) for a, b in pairs):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_what_is_cached_needs_no_network(there, folder, monkeypatch):
    from huggingface_hub import constants

    open_checkpoint(NAME).fetch()
    hub._snapshot.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    there.requests.clear()
    found = open_checkpoint(located(NAME))
    found.fetch()
    assert torch.equal(found.tensor("lm_head.weight"), open_checkpoint(folder).tensor("lm_head.weight"))
    assert not there.requests


def test_a_folder_here_wins_over_a_name(there, folder, tmp_path):
    shutil.copytree(folder, tmp_path / NAME)
    assert located(NAME) == str(tmp_path / NAME)
    assert open_checkpoint(NAME).path.resolve() == tmp_path / NAME
    assert title_of(NAME) == "tiny"
    assert not there.requests


def refusal(call, *arguments):
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    return caught.value.message


def test_what_is_neither_a_folder_nor_a_model_says_both(there):
    message = refusal(located, "acme/nothing")
    assert message.startswith("there is no folder acme/nothing here, and ")
    assert "has no model acme/nothing that you may see" in message
    for path in ("acme", "./acme/tiny", "a/b/c", "/nowhere/tiny", "acme/tiny@", "acme/ti ny", "../tiny", "-acme/tiny"):
        assert "does not exist; a model on the Hugging Face Hub is named ORG/NAME" in refusal(located, path), path
    assert refusal(open_checkpoint, "a/b/c") == refusal(located, "a/b/c")


def test_the_hubs_refusals_are_sentences(there, monkeypatch, capsys):
    assert "has no revision 'v9'" in refusal(located, f"{NAME}@v9")
    there.repos["acme/gated"] = Repo(there.repos[NAME].commits, files_need="GatedRepo")
    assert f"ask for access at {there.url}/acme/gated" in refusal(open_checkpoint, located("acme/gated"))
    there.repos["acme/private"] = Repo(there.repos[NAME].commits, needs="RepoNotFound")
    assert "a private one needs a token" in refusal(located, "acme/private")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert open_checkpoint("acme/private").config == open_checkpoint("acme/gated").config
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    hub._snapshot.cache_clear()
    assert "does not take your token" in refusal(located, "acme/private")
    capsys.readouterr()  # of bars
    assert main(["convert", "acme/nothing", "there"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_network_and_no_room_are_sentences(there, tmp_path, monkeypatch):
    from huggingface_hub import constants

    source = located(NAME)
    found = open_checkpoint(source)
    Usage = namedtuple("Usage", "total used free")
    with monkeypatch.context() as few:
        few.setattr(shutil, "disk_usage", lambda _: Usage(10, 9, 1))
        message = refusal(found.fetch)
        total = sum(found.folder.size(file) for file in set(found.weight_map.values()))
        assert f"{total:,} bytes are to be fetched" in message
        assert "room for 1; free some, or set HF_HOME" in message
    there.status = 500
    use_cache(monkeypatch, tmp_path / "empty")
    assert "cannot be reached" in refusal(located, NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set and acme/tiny is not in the cache" in refusal(located, NAME)
    assert "HF_HUB_OFFLINE is set" in refusal(open_checkpoint, source)


def test_a_cache_that_cannot_be_written_is_a_sentence(there, tmp_path, monkeypatch):
    from huggingface_hub import constants

    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    assert "cannot be written (Not a directory); set HF_HOME" in refusal(open_checkpoint, NAME)


def test_a_full_disk_is_a_sentence(there, monkeypatch):
    import errno

    import huggingface_hub

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = located(NAME)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert "cannot be written (No space left on device); set HF_HOME" in refusal(open_checkpoint, source)


def test_a_model_with_pickles_only_is_refused_unfetched(there, tmp_path, folder):
    (tmp_path / "old").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "old")
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"\x80")
    there.repos["acme/old"] = Repo()
    there.repos["acme/old"].push(tmp_path / "old")
    assert "holds .bin/.pt files" in refusal(open_checkpoint, "acme/old")
    assert there.fetched() == ["config.json"]


def test_a_single_file_is_fetched_when_weights_are_asked_for(there, folder, tmp_path):
    from safetensors.torch import save_file

    here = open_checkpoint(folder)
    (tmp_path / "single").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "single")
    shutil.copy(folder / "model.safetensors.index.json", tmp_path / "single")  # of an earlier save
    save_file({key: here.tensor(key) for key in here.weight_map}, tmp_path / "single" / "model.safetensors")
    there.repos["acme/single"] = Repo()
    there.repos["acme/single"].push(tmp_path / "single")
    found = open_checkpoint("acme/single")
    assert "model.safetensors" not in there.fetched()
    assert torch.equal(found.tensor("lm_head.weight"), here.tensor("lm_head.weight"))
    assert there.fetched().count("model.safetensors") == 1


def test_a_run_goes_on_with_the_commit_that_it_began_with(there, folder, tmp_path):
    config = load(NAME, ["--train.out_dir=run", f"--data.tokenizer={NAME}"])
    commit = there.repos[NAME].commits[0][0]
    assert config.train.init_from == config.data.tokenizer == f"{NAME}@{commit}"
    assert config.model == open_checkpoint(folder).config
    assert small_files(config.data.tokenizer).joinpath("tokenizer.json").is_file()
    later = there.repos[NAME].push(folder)
    write(tmp_path / "run")  # a checkpoint of the run
    from trinity.launch import save_settings

    save_settings(config)
    flags = ["--train.out_dir=run"]
    assert load(NAME, flags).train.init_from == f"{NAME}@{commit}"
    assert load(NAME, ["--train.out_dir=other"]).train.init_from == f"{NAME}@{later}"


def test_the_commands_take_a_name(there, folder, tmp_path, capfd):
    environment = {
        **os.environ, "HF_ENDPOINT": there.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    command = [sys.executable, "-m", "trinity.cli", "convert", NAME, str(tmp_path / "copy")]
    subprocess.run(command, env=environment, check=True, cwd=tmp_path, timeout=100)
    copied, here = open_checkpoint(tmp_path / "copy"), open_checkpoint(folder)
    assert all(torch.equal(copied.tensor(key), here.tensor(key)) for key in here.weight_map)


def test_an_offline_program_takes_a_name(there, folder):
    by_name, by_path = (LLM(source).generate([[1, 2, 3]], GREEDY)[0] for source in (NAME, folder))
    assert by_name == by_path
