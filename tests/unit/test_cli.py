"""The command line as a person meets it: its surface, its sentences, its exit codes."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from trinity.checkpoint import CheckpointWriter, open_checkpoint, write_tensors
from trinity.cli import COMMANDS, main
from trinity.config import Config, preset
from trinity.engine.request import SamplingParams
from trinity.launch import save_settings
from trinity.llm import LLM
from trinity.models.afmoe.init import init_weights
from trinity.models.afmoe.model import Afmoe
from trinity.pool.local import local_pool
from trinity.rpc.messages import Load
from trinity.text.tokenizer import Tokenizer

MODEL = preset("tiny").model_copy(
    update=dict(
        vocab_size=320, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, head_dim=8, num_experts=4
    )
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    pool = local_pool(MODEL, Load(seed=1), backend="torch")
    model = Afmoe(MODEL, pool.dispatcher())
    init_weights(model, seed=1)
    writer = CheckpointWriter(folder, 5)
    parts = [*pool.save(str(writer.folder), 0)(), *write_tensors(writer.folder, "model", model.tensors().items())]
    return writer.finish(parts, MODEL, Tokenizer.train(iter(["some text to learn from " * 20]), 320), None)


HEAVY = {"google", "grpc", "httpx", "matplotlib", "numba", "openai", "pandas", "pyarrow", "ray", "scipy", "starlette"}
HEAVY |= {"safetensors", "tokenizers", "torch", "transformers", "triton", "uvicorn"}
HELP = """
import runpy, sys
try:
    runpy.run_module("trinity.cli", run_name="__main__", alter_sys=True)
finally:
    print(*sys.modules, file=sys.stderr)
"""


def test_help_is_quick_and_names_every_command():
    """Counted in modules and in processor time beside that of the few libraries it needs, not by a clock."""
    done = subprocess.run([sys.executable, "-c", HELP, "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)
    modules = done.stderr.split()
    assert not HEAVY & {name.partition(".")[0] for name in modules}
    assert len(modules) < 600
    needs = [sys.executable, "-c", "import argparse, asyncio, numpy, pydantic, yaml"]
    assert cpu_s([sys.executable, "-m", "trinity.cli", "--help"]) < 3 * cpu_s(needs)


def cpu_s(command):
    """The least processor time of three runs."""
    spent_s = []
    for _ in range(3):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        spent_s.append(usage.ru_utime + usage.ru_stime)
    return min(spent_s)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_can_be_imported(name, capsys):
    import importlib

    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert COMMANDS[name][:30] in " ".join(capsys.readouterr().out.split())
    assert callable(importlib.import_module(f"trinity.commands.{name}").run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "missing.yaml"],
            "configuration file missing.yaml does not exist; presets are bench, glm-4.5, glm-4.5-air, large, mini, "
            "mini-slice, nano, qwen3-30b-a3b, tiny",
        ),
        (["train", "tiny", "--train.stepz", "1"], "did you mean 'train.steps'?"),
        (["serve", "missing"], "checkpoint folder missing does not exist"),
        (["generate", "missing", "--prompt", "x"], "checkpoint folder missing does not exist"),
        (["convert", "missing", "also-missing"], "checkpoint folder missing does not exist"),
        (["chat", "http://127.0.0.1:9"], "no server at http://127.0.0.1:9"),
    ],
)
def test_mistakes_end_in_one_sentence_and_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_full_disk_ends_in_one_sentence_too(capsys, monkeypatch):
    failing = {"number": errno.ENOSPC}

    def run(*_):
        raise OSError(failing["number"], os.strerror(failing["number"]), "runs/a.json")

    monkeypatch.setattr("trinity.commands.doctor.run", run)
    assert main(["doctor"]) == 2
    assert "cannot write runs/a.json: No space left on device; make room there" in capsys.readouterr().err
    failing["number"] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        main(["doctor"])


def test_the_demo_deletes_only_what_a_demo_made(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").touch()
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "was not made by the demo" in capsys.readouterr().err
    assert (tmp_path / "data" / "precious").exists()


def test_runs_are_not_mixed_resumed_from_nothing_or_started_from_another_model(checkpoint, tmp_path, capsys):
    def refused(*flags):
        assert main(["train", "tiny", "--train.out_dir", str(tmp_path / "run"), *flags]) == 2
        return capsys.readouterr().err

    assert "holds no checkpoint to resume from" in refused("--resume")
    assert "of another architecture than this configuration: vocab_size 320 instead of 2048" in refused(
        "--train.init_from", str(checkpoint)
    )
    (tmp_path / "file").touch()
    assert main(["train", "tiny", "--train.out_dir", str(tmp_path / "file")]) == 2
    assert "cannot write to train.out_dir" in capsys.readouterr().err


def test_a_file_without_a_model_takes_that_of_its_initial_weights(checkpoint, tmp_path, capsys):
    (tmp_path / "fine.yaml").write_text(f"train: {{init_from: {checkpoint}}}\ndata:\n")
    assert main(["train", str(tmp_path / "fine.yaml"), "--dry-run"]) == 0
    assert "vocab_size: 320" in capsys.readouterr().out


def test_dry_run_prints_the_resolved_settings(capsys):
    import yaml

    assert main(["train", "tiny", "--dry-run", "--train.steps", "3", "--serve.api_key", "hidden-key"]) == 0
    out = capsys.readouterr().out
    tree = yaml.safe_load(out)
    assert (tree["train"]["steps"], tree["model"]["hidden_size"]) == (3, 128)
    assert "hidden-key" not in out


@pytest.fixture
def run_folder(tmp_path):
    config = Config.from_tree({"model": MODEL.model_dump(), "train": {"out_dir": str(tmp_path)}})
    config = config.replace(placement={"pool": "mine"}, cluster={"namespace": "ours"}, serve={"api_key": "hidden-key"})
    save_settings(config)
    return tmp_path


def test_serving_a_run_takes_its_model_pool_and_namespace(run_folder, capsys):
    import yaml

    assert "hidden-key" not in (run_folder / "settings.yaml").read_text()
    arguments = ["serve", str(run_folder), "--weights", "pinned:7", "--placement.call_timeout_s", "9", "--dry-run"]
    assert main(arguments) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["model"]["vocab_size"], tree["cluster"]["namespace"]) == (320, "ours")
    assert (tree["placement"]["pool"], tree["placement"]["call_timeout_s"]) == ("mine", 9)
    assert tree["serve"]["weights"] == "pinned:7"


def test_mistakes_about_weights(run_folder, checkpoint, capsys):
    def refused(*arguments):
        assert main(["serve", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "choose checkpoint, live, pinned or pinned:STEP" in refused(checkpoint, "--weights", "newest")
    assert "choose checkpoint, live, pinned or pinned:STEP" in refused(run_folder, "--weights", "pinned:x")
    assert "holds no settings.yaml, so it is no run of `trinity train`" in refused(checkpoint, "--weights", "live")
    assert "give --cluster.address auto" in refused(run_folder, "--weights", "live")
    assert "is a run, not a checkpoint: name one of its step folders, or add --weights live" in refused(run_folder)


def test_unknown_arguments_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--serve.host", "x"])
    assert ended.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_generate_completes_each_prompt_and_says_what_is_wrong(checkpoint, capsys):
    assert main(["generate", str(checkpoint), "--prompt", "some", "--prompt", "text", "--max-tokens", "4"]) == 0
    once = capsys.readouterr().out
    assert len(once) > 2
    assert main(["generate", str(checkpoint), "--prompt", "some", "--prompt", "text", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == once
    assert main(["generate", str(checkpoint), "--prompt", "x", "--temperature", "-1"]) == 2
    assert "--temperature" in capsys.readouterr().err


def test_offline_commands_take_the_engines_settings(checkpoint, capsys):
    generate = ["generate", str(checkpoint), "--prompt", "some text", "--max-tokens", "4"]

    def refused(*flags):
        assert main([*generate, *flags]) == 2
        return capsys.readouterr().err

    assert main([*generate, "--engine.max_model_len", "64", "--placement.backend", "torch"]) == 0
    found = capsys.readouterr()
    assert "sequences of up to 64 tokens, engine.max_num_seqs 64 of them at once" in found.err
    assert main([*generate, "--placement.num_shards", "2"]) == 0
    assert capsys.readouterr().out == found.out
    assert "prompt tokens; this model takes 2 and one generated" in refused("--engine.max_model_len", "3")
    assert "did you mean 'engine.max_model_len'?" in refused("--engine.max_len", "64")
    assert "needs" in (said := refused("--engine.max_model_len", "1024", "--engine.kv_cache_bytes", "1000"))
    assert "is 1000; raise engine.kv_cache_bytes to at least" in said
    assert "--serve.http_port changes nothing without a server" in refused("--serve.http_port", "1")
    assert "--placement.redundancy changes nothing without a server" in refused("--placement.redundancy", "1")


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["chat", "--local"], ["serve"]])
def test_what_does_not_fit_is_refused_before_a_weight_is_read(command, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("trinity.engine.memory.free_and_total", lambda device: (1000, 1000))
    monkeypatch.setattr("trinity.checkpoint.tensor_file.TensorFile.read", None)
    monkeypatch.setattr("serving.app.start", None)
    assert main([command[0], str(checkpoint), *command[1:]]) == 2
    said = capsys.readouterr().err
    assert "of memory, 1,000 bytes is free here" in said
    assert "the weights take" in said


def test_training_that_serves_refuses_a_cache_that_does_not_fit(tmp_path, capsys):
    flags = ["--train.out_dir", str(tmp_path / "run"), "--engine.kv_cache_bytes", str(1 << 50)]
    assert main(["train", "tiny", "--serve", *flags]) == 2
    assert "engine.kv_cache_bytes is 1,125,899,906,842,624" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_conversation_with_a_checkpoint_in_this_process(checkpoint, capsys, monkeypatch):
    """The answers are the greedy ones of LLM.chat, the second with the first in its history; an error drops one message."""
    texts = iter(["Hello", "word " * 400, "again", ""])
    monkeypatch.setattr("trinity.commands.chat._ask", lambda: next(texts))
    flags = ["--max-tokens", "5", "--temperature", "0", "--engine.max_model_len", "300"]
    assert main(["chat", "--local", str(checkpoint), *flags]) == 2
    found, messages = capsys.readouterr(), [{"role": "user", "content": "Hello"}]
    llm, params = LLM(checkpoint, max_model_len=300), SamplingParams(max_tokens=5, temperature=0)
    first = llm.chat(messages, params).text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "again"}]
    assert found.out == f"{first}\n{llm.chat(messages, params).text}\n"
    assert "prompt tokens; this model takes 299" in found.err
    assert main(["chat", "http://127.0.0.1:9", "--engine.max_model_len", "64"]) == 2
    assert "a running server has its own settings" in capsys.readouterr().err


def test_convert_changes_the_type_and_the_files_but_not_the_weights(checkpoint, tmp_path, capsys):
    target = tmp_path / "small"
    generation = open_checkpoint(checkpoint).generation
    assert main(["convert", str(checkpoint), str(target), "--dtype", "bfloat16", "--max-file-gb", "0.0001"]) == 0
    assert "bfloat16" in capsys.readouterr().out
    before, after = open_checkpoint(checkpoint), open_checkpoint(target)
    assert after.config == before.config.model_copy(update={"dtype": "bfloat16"})
    assert after.version == before.version == 5
    assert not after.has_training_state
    assert after.generation == generation != {}
    assert len(set(after.weight_map.values())) >= 2
    assert after.weight_map.keys() == before.weight_map.keys()
    for key in before.weight_map:
        kept = torch.float32 if key.endswith("expert_bias") else torch.bfloat16
        assert torch.equal(after.tensor(key), before.tensor(key).to(kept)), key
    assert after.tokenizer.encode("some text") == before.tokenizer.encode("some text")
    assert main(["convert", str(checkpoint), str(target)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_doctor_reports_versions_devices_and_ports(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "megablocks", "backend auto", "memory", "HTTP 8000"):
        assert word in out
