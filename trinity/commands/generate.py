"""`trinity generate CHECKPOINT --prompt TEXT`: complete offline, everything in this process."""

import argparse

NAMES = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")


def run(arguments: argparse.Namespace, flags: list[str]) -> int:
    from pydantic import ValidationError

    from trinity.commands.offline import offline
    from trinity.engine.request import SamplingParams
    from trinity.errors import ConfigError

    given = {name: getattr(arguments, name) for name in NAMES}
    try:
        params = SamplingParams(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise ConfigError("; ".join(f"--{e['loc'][0]}: {e['msg']}" for e in error.errors())) from None
    llm = offline(arguments.checkpoint, flags, arguments.generation_config)
    if "temperature" not in (params.model_fields_set | llm.engine.defaults.values.keys()):
        params = params.model_copy(update={"temperature": 0.0})
    for completion in llm.generate(arguments.prompt, params):
        print(completion.text)
    return 0
