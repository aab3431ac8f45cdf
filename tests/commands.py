"""Commands as processes, run as a person runs them."""

import os
import subprocess
import sys
import time
import uuid

import pytest

from tests.waiting import have_passed

SILENCE_S = 100.0
ENV = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "TRITON"))}


def command(*arguments):
    return [sys.executable, "-m", "trinity.cli", *map(str, arguments)]


class Running:
    """A command whose words are kept in two files. One that says no new line for SILENCE_S is killed: the demo repeats what
    the weights of a step answer as long as that step lasts."""

    def __init__(self, folder, *arguments, python=("-m", "trinity.cli"), **where):
        self.files = [folder / f"said-{uuid.uuid4().hex}.{name}" for name in ("out", "err")]
        with self.files[0].open("w") as out, self.files[1].open("w") as err:
            words = [sys.executable, *map(str, (*python, *arguments))]
            self.process = subprocess.Popen(words, stdout=out, stderr=err, text=True, **{"env": ENV, **where})

    @property
    def stdout(self):
        return self.files[0].read_text()

    @property
    def stderr(self):
        return self.files[1].read_text()

    def until(self, holds):
        """Until that, or the command's end."""
        said, heard_s = -1, time.monotonic()
        while self.process.poll() is None and not holds():
            if (now := len({*self.stdout.splitlines(), *self.stderr.splitlines()})) > said:
                said, heard_s = now, time.monotonic()
            if have_passed(SILENCE_S, heard_s):
                self.process.kill()
                pytest.fail(f"{self.process.args} hangs. It said: {self.stdout} {self.stderr}")
            time.sleep(0.1)

    def ended(self):
        """Its exit code."""
        self.until(lambda: False)
        return self.process.returncode
