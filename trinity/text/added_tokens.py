"""Tokens in the files beside a tokenizer.json: names of special ones, and tokens that it lacks.

Decisions: as transformers reads them. tokenizer_config.json with `added_tokens_decoder` says all; an older one is overruled by
special_tokens_map.json and has its further tokens in added_tokens.json. A token that is named and not there gets the next
id. Not so bos and eos, which no model knows under an id that was made up here: they are refused (tokenizer.py).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from trinity.errors import CheckpointError
from trinity.text.special_tokens import BOS, EOS, PAD

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FAMILY = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
LISTS = ("extra_special_tokens", "additional_special_tokens")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
MOST = 1 << 16


def merged_config(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with special_tokens_map.json over it, unless it says all by itself."""
    return dict(config) if "added_tokens_decoder" in config else {**config, **special_map}


def special_names(config: Mapping[str, Any], core: tokenizers.Tokenizer) -> tuple[str, str, str]:
    """Return bos, eos and pad, "" for one that there is not. Where the files name none of the three they are the family's own,
    as far as the tokenizer has them."""
    if any(name in config for name in FAMILY):
        bos, eos, pad = (token_name(config.get(name)) for name in FAMILY)
    else:
        bos, eos, pad = (name if core.token_to_id(name) is not None else "" for name in FAMILY.values())
    return bos, eos, pad


def add_lacking(core: tokenizers.Tokenizer, config: Mapping[str, Any], older: Mapping[str, Any]) -> None:
    """Give the tokenizer the tokens that `config`, or added_tokens.json (`older`), names beyond its own."""
    listed = [*_listed(config), *_older(config, older)]
    named = [*(token_name(config.get(name)) for name in NAMES[2:]), *_extra(config)]
    if len(listed) + len(named) > MOST:
        raise CheckpointError(f"tokenizer_config.json names {len(listed) + len(named):,} tokens; {MOST:,} may be added")
    added = {token.content for token in core.get_added_tokens_decoder().values()}
    listed += [AddedToken(name, special=True) for name in dict.fromkeys(named) if name and name not in added]
    core.add_tokens([token for token in listed if token.content not in added])


def token_name(value: Any) -> str:
    """Checkpoints write a token as its text, as a mapping with `content`, or as null."""
    name = value.get("content") if isinstance(value, Mapping) else value
    if name is not None and not isinstance(name, str):
        raise CheckpointError(f"tokenizer_config.json names {str(name)[:100]} as a token; a text is wanted")
    return name or ""


def _listed(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    """Tokens of `added_tokens_decoder`, id -> mapping, in the order of their ids."""
    found = config.get("added_tokens_decoder", {})
    if not isinstance(found, Mapping) or not all(i.isdecimal() and isinstance(t, Mapping) for i, t in found.items()):
        raise CheckpointError("tokenizer_config.json: added_tokens_decoder is not a mapping of ids to tokens")
    for _, token in sorted(found.items(), key=lambda item: int(item[0])):
        yield AddedToken(token_name(token), **{flag: token[flag] is True for flag in FLAGS if flag in token})


def _older(config: Mapping[str, Any], older: Mapping[str, Any]) -> Iterator[AddedToken]:
    """Tokens of added_tokens.json, text -> id, in the order of their ids."""
    if not all(type(i) is int for i in older.values()):
        raise CheckpointError("added_tokens.json is not a mapping of tokens to ids")
    special = {*(token_name(config.get(name)) for name in NAMES), *_extra(config)}
    for text in sorted(older, key=older.__getitem__) if "added_tokens_decoder" not in config else ():
        yield AddedToken(text, normalized=text not in special, special=text in special)


def _extra(config: Mapping[str, Any]) -> Iterator[str]:
    """Special tokens beyond those with a role: a list, a mapping of roles to texts, or roles of the model's own."""
    for key, value in config.items():
        if key.endswith("_token") and key not in NAMES and isinstance(value, str):
            yield value
    found = next((config[key] for key in LISTS if config.get(key)), ())
    if not isinstance(found, list | tuple | Mapping):
        raise CheckpointError(f"tokenizer_config.json: {LISTS[0]} is {str(found)[:100]!r}; a list of tokens is wanted")
    yield from map(token_name, found.values() if isinstance(found, Mapping) else found)
