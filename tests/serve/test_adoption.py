"""A server of a shared cluster and the commands around it: one dies, another takes over or is refused, a third ends it."""

import signal
import threading
import uuid

import httpx
import pytest
from test_real import MODEL, write_checkpoint

from tests.commands import Running
from tests.waiting import WAIT_S, until
from trinity.cli import main
from trinity.config import merged

pytestmark = pytest.mark.timeout(300)  # several commands; one that hangs ends sooner, by its silence
ENDLESS = MODEL.model_copy(update={"max_position_embeddings": 1 << 15})


class Stream:
    """A long answer, read on a thread until it is closed."""

    def __init__(self, url):
        self.chunks, self.error, self._closed = [], None, threading.Event()
        self._thread = threading.Thread(target=self._read, args=(url,), daemon=True)
        self._thread.start()

    def _read(self, url):
        asked = {"prompt": "word 1", "max_tokens": 32000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=WAIT_S) as answer:
            for line in answer.iter_lines():
                self.chunks.extend([line] if line else [])
                if self._closed.is_set():
                    return

    def goes_on(self):
        """Until more of it has come."""
        before = len(self.chunks)
        until(lambda: len(self.chunks) > before + 5)
        assert not [chunk for chunk in self.chunks if "error" in chunk or "[DONE]" in chunk]

    def close(self):
        self._closed.set()
        self._thread.join(WAIT_S)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("adopted") / "model", ENDLESS)


@pytest.fixture
def shared(ray_session):
    """Flags of a cluster in which commands meet; it is empty afterwards."""
    from serving.adoption import ended

    yield ["--cluster.address", ray_session.get_runtime_context().gcs_address, "--cluster.auth", "disabled"]
    list(ended("trinity"))


@pytest.fixture
def serving(shared, checkpoint):
    """The arguments of a server in it, with a pool of its own."""
    pool = f"a-{uuid.uuid4().hex[:8]}"
    return ["serve", checkpoint, "--http-port", 0, "--grpc-port", 0, "--placement.pool", pool, *shared]


def ready(command):
    """-> the HTTP address that it prints."""
    command.until(lambda: "\nready" in command.stdout)
    assert "\nready" in command.stdout, command.stderr
    return command.stdout.split()[1]


def refused(capsys, arguments):
    assert main([str(each) for each in arguments]) == 2
    return capsys.readouterr().err


def things_left(serving):
    from actors import pool as pools
    from serving.adoption import overview

    return overview() is not None, pools.exists(serving[serving.index("--placement.pool") + 1], "trinity")


def test_what_runs_is_refused_adopted_or_ended(serving, shared, capsys):
    """A server whose command is gone, as this process leaves it."""
    from serving import adoption, app
    from serving.launch import provide_weights, resolve

    checkpoint, flags = str(serving[1]), [str(each) for each in serving[2:]]
    flags = [
        f"--serve.{each[2:].replace('-', '_')}" if each in ("--http-port", "--grpc-port") else each for each in flags
    ]
    config = resolve(checkpoint, merged(None, flags))
    provide_weights(config, checkpoint)
    url = app.start(config, checkpoint).http_url
    said = refused(capsys, serving)
    assert all(part in said for part in (checkpoint, url, "'model'", "--adopt", "trinity serve stop")), said
    said = refused(capsys, [*serving, "--adopt", "--engine.max_num_seqs", 7, "--serve.api_key", "not-to-be-shown"])
    assert "engine.max_num_seqs is 64, not 7, serve.api_key is another; adopt it with" in said
    assert adoption.adopted(config, checkpoint).http_url == url
    assert main(["serve", "stop", *shared]) == 0
    assert "the application is ended\npool a-" in capsys.readouterr().out
    assert things_left(serving) == (False, False)


@pytest.mark.chaos
def test_another_command_takes_over_what_a_dead_one_left_and_a_third_ends_it(serving, shared, tmp_path, capsys):
    first = Running(tmp_path, *serving)
    url = ready(first)
    stream = Stream(url)
    stream.goes_on()
    first.process.kill()
    first.process.wait()
    stream.goes_on()
    assert "adopt" in refused(capsys, serving)
    second = Running(tmp_path, *serving, "--adopt")
    assert ready(second) == url
    stream.goes_on()
    stream.close()
    assert main(["serve", "stop", *shared]) == 0
    said = capsys.readouterr().out
    assert f"draining: {serving[1]} is served here since" in said
    assert "the application is ended\npool a-" in said
    assert second.ended() == 0, second.stderr
    assert "another command has ended it" in second.stdout
    assert things_left(serving) == (False, False)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health")


@pytest.mark.chaos
def test_who_adopts_nothing_starts_it_and_ends_it(serving, shared, tmp_path, capsys):
    assert main(["serve", "stop", *shared]) == 0
    assert capsys.readouterr().out == "nothing is served in this cluster\n"
    running = Running(tmp_path, *serving, "--adopt")
    ready(running)
    running.process.send_signal(signal.SIGINT)
    assert running.ended() == 0, running.stderr
    assert "draining" in running.stdout
    assert things_left(serving) == (False, False)
