"""Two hosts: a shard in one network namespace, its caller in another, a cable between them that can be cut.

This file is also the program of both processes: `python network_hosts.py shard|caller`, told what to do by lines of JSON on
stdin (see `Shard` and `Caller`). The test process stays where it is and knows what must come out: it has the same experts.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from actors.dataplane import connection
from actors.dataplane.client import DirectTransport
from actors.dataplane.connection import Address, machine_id
from actors.dataplane.frames import FrameLimits
from actors.dataplane.server import Combiner, DirectServer
from trinity.config import OptimConfig, PlacementConfig, preset
from trinity.dispatch.transport import LocalTransport, result_with_retry
from trinity.dispatch.view import StaticView
from trinity.errors import TrinityError
from trinity.pool.local import local_pool
from trinity.pool.pool import ExpertPool
from trinity.rpc.messages import Abort, Load, Prepare

MODEL = preset("tiny").model_copy(
    update=dict(hidden_size=16, moe_intermediate_size=8, num_experts=8, num_experts_per_tok=3)
)
LAYER = MODEL.moe_layers[0]
SECRET = b"n" * 32
SHARD_HOST, CALLER_HOST = "10.77.0.1", "10.77.0.2"
TOO_SOON_S = 1.0  # a deadline that passes while the cable is cut
ROOT = Path(__file__).parents[2]


# -- the two programs


def own_pool():
    return local_pool(MODEL, Load(seed=5), optim=OptimConfig(), backend="torch")


def batch(seed=0, num_tokens=13):
    rng = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, MODEL.hidden_size, generator=rng, requires_grad=True)
    ids_TK = torch.rand(num_tokens, MODEL.num_experts, generator=rng).topk(3).indices
    return x_TD, ids_TK, torch.rand(num_tokens, 3, generator=rng, requires_grad=True)


class Shard:
    """Real experts behind a DirectServer on `host`, which the test can hold up and ask what they have done."""

    def __init__(self, host):
        self.shard = own_pool().transport.shards["shard-0"]
        self.server = DirectServer(Combiner(self.shard), FrameLimits(16, 8, torch.float32), SECRET, host)
        self.gate = threading.Event()
        self.gate.set()
        backward, self.num_seen = self.shard.backward, 0

        def gated(call):
            self.num_seen += 1
            assert self.gate.wait(30)
            return backward(call)

        self.shard.backward = gated

    def where(self):
        return asdict(self.server.address)

    def loopback(self):
        """Where another server of this shard listens that was not told where to."""
        other = DirectServer(
            Combiner(self.shard), FrameLimits(16, 8, torch.float32), SECRET, PlacementConfig().data_host
        )
        return asdict(other.address)

    def hold(self):
        self.gate.clear()

    def release(self):
        self.gate.set()

    def seen(self):
        return self.num_seen

    def gathered(self):
        """Distinct backward ops and expert gradients since the last time; forgets them."""
        with self.server.combiner.others.lock:
            report = self.shard.prepare(Prepare(1))
            grads = {name: grad.tolist() for name, grad in self.shard.gathered.sums().items()}
            self.shard.abort(Abort(1))
        return {"num_ops": report.num_ops, "grads": grads}

    def reach(self, host, port):
        return reach(host, port)


class Caller:
    """A dispatcher over the direct transport; remembers what it sent, to send it again."""

    def __init__(self, **address):
        self.address, self.last = Address(**address), None
        self.direct = DirectTransport(LocalTransport({}), lambda shard, deadline_s: self.address, SECRET)
        self.pool = ExpertPool(StaticView(own_pool().table), self, timeout_s=20)
        self.made = None

    def send(self, shard, verb, message):
        self.last = shard, verb, message
        return self.direct.send(shard, verb, message)

    def machine(self):
        return machine_id()

    def families(self):
        return [each.wire.sock.family.name for each in self.direct._connections.values()]

    def layer(self, seed=0):
        """y, dx and dweights of one layer's call."""
        return {"y": self.forward(seed=seed), **self.backward()}

    def forward(self, timeout_s=20.0, seed=0):
        dispatcher = self.pool.dispatcher()
        dispatcher.timeout_s = timeout_s
        x_TD, ids_TK, weights_TK = batch(seed)
        y_TD = dispatcher(LAYER, x_TD, ids_TK, weights_TK)
        self.made = dispatcher, x_TD, weights_TK, y_TD
        return y_TD.tolist()

    def backward(self, timeout_s=20.0):
        dispatcher, x_TD, weights_TK, y_TD = self.made
        dispatcher.timeout_s = timeout_s
        dx_TD, dweights_TK = torch.autograd.grad(y_TD.square().sum(), [x_TD, weights_TK])
        return {"dx": dx_TD.tolist(), "dweights": dweights_TK.tolist()}

    def again(self):
        """What was sent last, under the same op_id, with more time."""
        shard, verb, message = self.last
        message = replace(message, deadline_s=time.monotonic() + 20)
        reply = self.send(shard, verb, message)
        dx_RD, dweights_RK = result_with_retry(self, shard, verb, message, reply, message.deadline_s)
        return {"dx": dx_RD.tolist(), "dweights": dweights_RK.tolist()}

    def many(self, num, seconds=0.0):
        """At least `num` calls and for so long, every tenth a large one: how many there were, and how many gave what the
        same experts give here."""
        here, there = own_pool().dispatcher(), self.pool.dispatcher()
        there.timeout_s, end_s = 20.0, time.monotonic() + seconds
        found = []
        with torch.inference_mode():
            while len(found) < num or time.monotonic() < end_s:
                each = batch(len(found), 13 if len(found) % 10 else 300)
                found.append(torch.equal(there(LAYER, *each), here(LAYER, *each)))
        return [len(found), sum(found)]

    def impatient(self, silence_s=1.0):
        connection.SILENCE_S = silence_s

    def moved(self, **address):
        """A layer's call, when the shard that this is connected to listens elsewhere and nobody has said so."""
        self.address = Address(**address)
        return self.forward(timeout_s=60.0)

    def elsewhere(self, **address):
        """Turn to another address."""
        self.direct.close()
        self.address = Address(**address)

    def reach(self, host, port):
        return reach(host, port)


def reach(host, port):
    try:
        socket.create_connection((host, port), timeout=0.5).close()
    except OSError as error:
        return type(error).__name__
    return "reached"


def program():
    """Each line in names a method and its arguments; each line out is its value, or the TrinityError it raised, and when."""
    torch.set_num_threads(1)
    kind, orders = {"shard": Shard, "caller": Caller}[sys.argv[1]], json.loads(sys.stdin.readline())
    process = kind(**orders)
    for line in sys.stdin:
        verb, arguments = json.loads(line)
        started_s = time.monotonic()
        try:
            found = {"value": getattr(process, verb)(**arguments)}
        except TrinityError as error:
            found = {"error": type(error).__name__, "message": error.message}
        print(json.dumps(found | {"seconds": time.monotonic() - started_s}), flush=True)
    os._exit(0)


# -- the cable


class Failed(Exception):
    """A TrinityError of the other process."""

    def __init__(self, answer):
        super().__init__(answer["message"])
        self.kind, self.seconds = answer["error"], answer["seconds"]


class Process:
    """One of the programs above, in a network namespace or on a host of tests/chaos/hosts.py."""

    def __init__(self, where, kind, **orders):
        inside, env = (
            (["ip", "netns", "exec", where], os.environ) if isinstance(where, str) else (where.inside, where.env({}))
        )
        environment = dict(env, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        command = [*inside, sys.executable, __file__, kind]
        self.popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        self._write(orders)

    def start(self, verb, **arguments):
        self._write([verb, arguments])

    def finish(self):
        answer = json.loads(self.popen.stdout.readline())
        self.seconds = answer["seconds"]
        if "error" in answer:
            raise Failed(answer)
        return answer["value"]

    def __call__(self, verb, **arguments):
        self.start(verb, **arguments)
        return self.finish()

    def close(self):
        self.popen.kill()
        self.popen.wait()
        self.popen.stdin.close()
        self.popen.stdout.close()

    def _write(self, tree):
        self.popen.stdin.write(json.dumps(tree) + "\n")
        self.popen.stdin.flush()


def ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


def why_not():
    """Why two network namespaces with a cable cannot be made here, if so. A mistake of ours is no reason."""
    if os.geteuid() or not shutil.which("ip"):
        return "network namespaces need root and `ip`"
    probe = f"trn-{secrets.token_hex(3)}"
    made = ip("netns", "add", probe, check=False)
    cable = ip("-n", probe, "link", "add", "name", "one", "type", "veth", "peer", "name", "two", check=False)
    ip("netns", "del", probe, check=False)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    is_kernel = "RTNETLINK" in cable.stderr or "Unknown device type" in cable.stderr
    return f"no veth devices here: {cable.stderr.strip()}" if is_kernel else ""


@contextmanager
def namespaces():
    """-> the names of two, with a cable between their devices of the same name; nothing of it is left afterwards."""
    name = f"trn-{secrets.token_hex(3)}"
    ends = {f"{name}-s": SHARD_HOST, f"{name}-c": CALLER_HOST}
    one, two = ends
    try:
        for end in ends:
            ip("netns", "add", end)
            ip("-n", end, "link", "set", "lo", "up")
        ip("-n", one, "link", "add", "name", one, "type", "veth", "peer", "name", two, "netns", two)
        for end, host in ends.items():
            ip("-n", end, "addr", "add", f"{host}/24", "dev", end)
            ip("-n", end, "link", "set", end, "up")
        yield one, two
    finally:
        for end in ends:
            ip("netns", "del", end, check=False)


class Hosts:
    def __init__(self, shard_at, caller_at):
        self.shard_at, self.caller_at = shard_at, caller_at
        self.shard = Process(shard_at, "shard", host=SHARD_HOST)
        try:
            self.address = self.shard("where")
            self.caller = Process(caller_at, "caller", **self.address)
        except BaseException:
            self.shard.close()
            raise

    def cut(self):
        ip("-n", self.shard_at, "link", "set", self.shard_at, "down")

    def mend(self):
        ip("-n", self.shard_at, "link", "set", self.shard_at, "up")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.caller.close()
        self.shard.close()


if __name__ == "__main__":
    program()
