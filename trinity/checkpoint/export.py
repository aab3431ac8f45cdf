"""A checkpoint as others take it: weights, tokenizer and a card, without what only training needs.

Decision: its files are the checkpoint's own, linked, so that an export takes no room and outlives the checkpoint. An
adapter's are written anew, merged with its base.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from trinity.checkpoint.layout import INDEX, MANIFEST, PARTIAL
from trinity.checkpoint.read import open_checkpoint
from trinity.checkpoint.rewrite import rewrite
from trinity.errors import ConfigError

CARD = "README.md"


def export(checkpoint: Path, target: Path, card: str) -> Path:
    """Make `target` from a checkpoint, whole or not at all, in the place of an export that was there; -> target.

    Raises ConfigError where something else is there, or nothing can be written."""
    check_target(target)
    scratch = target.with_name(target.name + PARTIAL)
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        if (source := open_checkpoint(checkpoint)).adapter is not None:
            checkpoint = scratch / "merged"
            rewrite(source, checkpoint)
        for file in checkpoint.iterdir():
            if file.is_file() and file.name not in (MANIFEST, INDEX):
                _linked(file, scratch / file.name)
        (scratch / INDEX).write_text(json.dumps(_index(json.loads((checkpoint / INDEX).read_text())), indent=2))
        (scratch / CARD).write_text(card)
        shutil.rmtree(scratch / "merged", ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}") from None
    return target


def check_target(target: Path) -> None:
    """Raise ConfigError where something else than an export is there."""
    if target.exists() and not (target / CARD).is_file():
        raise ConfigError(f"{target} is there and is no export; choose another name, or move it away")


def _linked(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy(source, target)


def _index(tree: dict[str, object]) -> dict[str, object]:
    """The index without the manifest, which speaks of files that are left behind."""
    metadata = tree.get("metadata")
    kept = {key: value for key, value in metadata.items() if key != "manifest"} if isinstance(metadata, dict) else {}
    return {**tree, "metadata": kept}


def card_of(name: str, facts: Mapping[str, object], scores: str = "") -> str:
    """The text of a model card: YAML that hubs read, what the weights come from, and a table of what they score."""
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    return f"---\nlibrary_name: transformers\ntags: [mixture-of-experts]\n---\n\n# {name}\n\n| | |\n|---|---|\n{rows}\n{scores}"
