"""The server where much is against it: a model that has only a name, a company's proxy, a long TMPDIR, no home, a working
directory with files of our packages' names that is not to be written."""

import os
import re
import signal
from pathlib import Path

import httpx
import pytest

from tests.chaos.meter import family
from tests.commands import ENV, Running
from tests.hub import Repo, running
from tests.sockets import listening_each
from tests.unit.checkpoint_files import MODEL, plain, write
from trinity.cli import main
from trinity.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"
SCRIPT = "import sys\nfrom trinity.cli import main\nsys.exit(main())\n"  # as an installation makes it


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from tests.unit import checkpoint_files

    tokenizer = Tokenizer.train(iter(["some words, in no language"]), 300)
    monkeypatch.setattr(checkpoint_files, "MODEL", MODEL.model_copy(update={"vocab_size": 320}))
    model = plain(write(tmp_path / "model")[1])
    tokenizer.save(model)
    with running() as found:
        found.repos["acme/tiny"] = Repo()
        found.repos["acme/tiny"].push(model)
        yield found, model


def said_while(url, act):
    """A stream, in whose middle that is done."""
    body = {"prompt": [1, 2, 3], "max_tokens": 200, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=url, trust_env=False, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        pieces = answer.iter_text()
        said = next(pieces)
        act()
        return said + "".join(pieces)


@pytest.mark.timeout(600)
def test_a_model_is_served_by_its_name_whatever_is_around(hub, tmp_path, capsys):
    hub, model = hub
    work, script = tmp_path / "work", tmp_path / "bin" / "trinity"
    work.mkdir()
    for name in ("serving.py", "actors.py", "protos.py"):
        (work / name).write_text("x = 1\n")
    script.parent.mkdir()
    script.write_text(SCRIPT)
    work.chmod(0o500)
    temporary = tmp_path / ("long-" * 20)
    temporary.mkdir()
    env = {
        **{key: value for key, value in ENV.items() if not key.lower().endswith("_proxy")},
        "http_proxy": NOWHERE, "https_proxy": NOWHERE, "no_proxy": "intra.example",
        "TMPDIR": str(temporary), "HOME": "/nonexistent",
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT), "LANG": "C",
    }  # fmt: skip
    memory = tmp_path / "memory"
    arguments = ("serve", "acme/tiny", "--http-port", 0, "--grpc-port", 0, "--placement.memory_dir", memory)
    arguments += ("--engine.kv_tier_bytes", 1 << 20)
    server = Running(tmp_path, *arguments, python=(script,), cwd=work, env=env, process_group=0)
    try:
        server.until(lambda: "\nready" in server.stdout)
        assert "\nready" in server.stdout, server.stderr
        (url,) = re.findall(r"^HTTP (\S+)", server.stdout, re.MULTILINE)
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "acme/tiny"
            answer = client.post("/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4
        ports = listening_each(family(server.process.pid))
        assert sum(map(len, ports.values())) > 6  # Ray's as well as ours
        assert {host for found in ports.values() for host, _ in found} == {"127.0.0.1"}, ports
        assert main(["serve", str(model), "--http-port", url.rsplit(":", 1)[1]]) == 2
        assert "choose another" in capsys.readouterr().err
        assert len(hub.fetched()) == len(set(hub.fetched())), "one cache, each file once"
        assert list(memory.glob("trinity-kv-*"))
        answer = said_while(url, lambda: os.killpg(server.process.pid, signal.SIGTERM))  # as `timeout` does
        assert answer.endswith("data: [DONE]\n\n"), answer
        assert server.ended() == 0
        assert list(memory.iterdir()) == []
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health", timeout=5, trust_env=False)
    finally:
        if server.process.poll() is None:
            server.process.kill()
