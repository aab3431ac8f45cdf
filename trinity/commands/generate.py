"""`trinity generate CHECKPOINT --prompt TEXT`: complete offline, everything in this process."""

import argparse


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    from pydantic import ValidationError

    from trinity import LLM
    from trinity.engine.request import SamplingParams
    from trinity.errors import ConfigError

    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
    try:
        params = SamplingParams(**{name: getattr(arguments, name) for name in names})
    except ValidationError as error:
        raise ConfigError("; ".join(f"--{e['loc'][0]}: {e['msg']}" for e in error.errors())) from None
    for completion in LLM(arguments.checkpoint).generate(arguments.prompt, params):
        print(completion.text)
    return 0
