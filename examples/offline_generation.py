"""Complete prompts from a checkpoint in this process: no server, no Ray, the same engine.

    .venv/bin/python examples/offline_generation.py runs/demo/step-000200 "import os" "def main("

All prompts run in one batch. A seed gives the same text in any batch; temperature 0 needs none.
"""

import argparse

from trinity import LLM
from trinity.engine.request import SamplingParams


def main(arguments: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder such as runs/demo/step-000200")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=32)
    given = parser.parse_args(arguments)

    llm = LLM(given.checkpoint)
    greedy = SamplingParams(max_tokens=given.max_tokens, temperature=0, logprobs=0)
    drawn = SamplingParams(max_tokens=given.max_tokens, temperature=0.8, top_p=0.9, seed=7)
    for prompt, completion in zip(given.prompts, llm.generate(given.prompts, greedy), strict=True):
        logprob = sum(position.logprob for position in completion.logprobs or ())
        print(f"{prompt!r} -> {completion.text!r} ({completion.finish_reason}, log-probability {logprob:.2f})")
    texts = [completion.text for completion in llm.generate(given.prompts, drawn)]
    print(f"and with temperature 0.8: {texts}")
    return texts


if __name__ == "__main__":
    main()
