"""A server of the OpenAI API without a model: it answers by rule, and fails when it is told to.

Its rule writes each word of the passage backwards, which is as long, of the same script and no copy. `faults` has, for the
n-th question, a status, a reply of its own, or DROP; `asked` is every question that came, `most` how many were there at a time.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DROP = "drop"
PASSAGE = "Passage: "  # what a prompt has before the passage
VERSIONS = {"first": 6, "last": 7}


def backwards(text):
    return " ".join(word[::-1] for word in text.split())


class ModelServer:
    """`with ModelServer() as server`: it listens on a loopback port of its own."""

    def __init__(self, answer=backwards, faults=None, is_met=lambda number: None):
        self.answer, self.faults, self.is_met = answer, dict(faults or {}), is_met
        self.asked, self.keys, self.here, self.most, self._lock = [], [], 0, 0, threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_of": self}))
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # of a client that was killed
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()

    def reply(self, body):
        """-> (status, what is said) or DROP."""
        with self._lock:
            number, self.here = len(self.asked), self.here + 1
            self.most = max(self.most, self.here)
            self.asked.append(body)
        self.is_met(number)
        with self._lock:
            self.here -= 1
        fault = self.faults.get(number, self.faults.get("all"))
        if isinstance(fault, int):
            return fault, {"error": {"message": f"fault {fault}"}}
        return (fault if fault == DROP else (200, fault)) if fault is not None else (200, self._answer(body))

    def _answer(self, body):
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        text = self.answer(prompt.partition(PASSAGE)[2] or prompt)
        said = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        choice = {"index": 0, "finish_reason": "stop", "weights_versions": VERSIONS, **said}
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
        return {"choices": [choice], "usage": usage, "system_fingerprint": "weights-7"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._send(200, {"data": [{"id": "backwards", "max_model_len": 4096}]})

    def do_POST(self):
        self.server_of.keys.append(self.headers.get("authorization"))
        found = self.server_of.reply(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        if found == DROP:
            self.close_connection = True
            return
        self._send(*found)

    def _send(self, status, tree):
        data = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        if status in (429, 503):
            self.send_header("retry-after", "0.01")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        return None
