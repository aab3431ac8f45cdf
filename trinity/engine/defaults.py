"""Sampling as the authors of a checkpoint recommend it: generation_config.json as defaults of what a request leaves open.

Decisions: what a request sets counts, then the checkpoint, then OpenAI's default, field by field; `model_fields_set` of
SamplingParams says what is set. The values are checked when the checkpoint is opened, never with the first request. As in
vLLM, `do_sample` changes nothing: whoever wants the likeliest token asks for temperature 0. What is in the file and not
followed is named once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trinity.engine.request import SamplingParams
from trinity.errors import CheckpointError, InvalidRequest

GenerationConfig = Literal["checkpoint", "none"]
FILE = "generation_config.json"
FOLLOWED = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    "max_new_tokens": "max_tokens",
}
WITHOUT_EFFECT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),  # the first three are the model's
    *("do_sample", "transformers_version", "_from_model_config", "use_cache", "cache_implementation"),
}


@dataclass(frozen=True)
class SamplingDefaults:
    """Defaults of one checkpoint: the fields of `params` that are set. `ignored`: names in the file that mean nothing here."""

    params: SamplingParams = field(default_factory=SamplingParams)
    ignored: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, Any]:
        return self.params.model_dump(exclude_unset=True)

    @property
    def max_tokens(self) -> int | None:
        return self.values.get("max_tokens")

    def fill(self, params: SamplingParams) -> SamplingParams:
        """The same parameters, with the defaults where they leave one open."""
        more = {name: value for name, value in self.values.items() if name not in params.model_fields_set}
        return params.model_copy(update=more) if more else params

    def sentences(self) -> list[str]:
        """Lines for the log about what the file does; none where it does nothing."""
        told = ", ".join(f"{name} {value:g}" for name, value in self.values.items())
        unknown = ", ".join(self.ignored)
        return [
            *(
                [f"{FILE} sets defaults for requests: {told} (--generation-config none: those of OpenAI)"]
                if told
                else []
            ),
            *([f"{FILE} also has {unknown}: not followed"] if unknown else []),
        ]


def read_defaults(tree: Mapping[str, Any] | None, where: object) -> SamplingDefaults:
    """Read the content of a generation_config.json in the folder `where`. Raises CheckpointError for a value out of bounds."""
    given = {key: value for key, value in (tree or {}).items() if value is not None}
    off = {"top_k": 0} if given.get("top_k") == -1 else {}
    values = {FOLLOWED[key]: value for key, value in {**given, **off}.items() if key in FOLLOWED}
    try:
        if values.get("max_tokens") == 0:
            raise InvalidRequest("max_tokens: 0 would leave every answer empty", param="max_tokens")
        params = SamplingParams.parse(**values)
    except InvalidRequest as error:
        said, found = error.message.replace("max_tokens", "max_new_tokens"), values.get(error.param or "")
        raise CheckpointError(
            f"{where}/{FILE}: {said} (found {found!r}); correct the file, or say --generation-config none "
            "(serve.generation_config)"
        ) from None
    on = {key for key, value in given.items() if value is not False}  # transformers writes what it would not do, too
    ignored = sorted(str(key)[:100] for key in on - FOLLOWED.keys() - WITHOUT_EFFECT)
    return SamplingDefaults(params, tuple(ignored))
