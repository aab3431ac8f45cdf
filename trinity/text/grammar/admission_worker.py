"""The process in which constraints are tried: `python -m trinity.text.grammar.admission_worker SECONDS`.

Frames (trinity/utils/boxes.py): a line of JSON with the constraint and the digest of its vocabulary, then the vocabulary where
this process asked for it. Back comes `?`, which asks for it, or JSON: the grammar, or why there is none. The library's table of
a vocabulary is made once, outside the constraint's time.
"""

import json
import os
import signal
import sys
from functools import partial

from trinity.text.grammar.admission import UNKNOWN
from trinity.text.grammar.compiler import grammar, matcher, try_out
from trinity.text.grammar.constraint import Constraint
from trinity.text.grammar.vocabulary import Vocabulary
from trinity.text.template_worker import serve

MEMORY_BYTES = 2 << 30
SETUP_S = 30.0
Known = dict[str, Vocabulary]


def answer(known: Known, cpu_s: float, request: bytes) -> bytes:
    line, _, packed = request.partition(b"\n")
    asked = json.loads(line)
    if packed:
        known.clear()
        known[asked["vocabulary"]] = vocabulary = Vocabulary.unpacked(packed)
        assert vocabulary.tokenizer, "made now"
    elif (found := known.get(asked["vocabulary"])) is None:
        return UNKNOWN
    else:
        vocabulary = found
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    return json.dumps(tried(Constraint(**asked["constraint"]), vocabulary)).encode()


def tried(constraint: Constraint, vocabulary: Vocabulary) -> dict[str, str]:
    try:
        text = grammar(constraint, vocabulary)
        try_out(matcher(text, vocabulary), len(vocabulary.tokens))
        return {"grammar": text}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory to compile; ask for less structure"}
    except RecursionError:
        return {"error": "it is nested too deeply; flatten it"}
    except ValueError as error:
        return {"error": f"{str(error)[:300]}"}


if __name__ == "__main__":
    os.nice(10)
    serve(partial(answer, {}, float(sys.argv[1])), MEMORY_BYTES, SETUP_S)
