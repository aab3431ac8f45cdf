"""Text for training: find documents, tokenise them once, and cut them into sequences by (seed, step) alone.

Decision: sequence i is tokens [i S, i S + S] of all documents laid end to end (its last token is only a target), so an epoch
sees each token once but for a last part shorter than a sequence. Documents are not padded; `docs_BS` tells which tokens may
see each other.
"""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trinity.checkpoint import small_files
from trinity.config import DataConfig, ModelConfig, TrainConfig
from trinity.data.answers import PackedLabels, PackedPairs
from trinity.data.best_fit import PackedDocuments
from trinity.data.cache import Cache
from trinity.data.chat_store import ChatRecipe, chat_stores
from trinity.data.dataset import Dataset, Packed, PackedDataset, Source
from trinity.data.documents import Found, documents
from trinity.data.kept import fingerprint
from trinity.data.length_bias import drawn
from trinity.data.listing import listed
from trinity.data.mixture import Mixture, with_name
from trinity.data.packed_chats import PackedChats
from trinity.data.pairs import AnswerRecipe, answer_stores
from trinity.data.prompts import PackedPrompts, prompt_stores
from trinity.data.remote import RemoteFile
from trinity.data.rsdb import BufferedDocuments
from trinity.data.shards import Recipe
from trinity.data.slot_states import SlotStates
from trinity.data.token_store import TextRecipe, TokenStore, logger, shards_cache, token_stores
from trinity.errors import ConfigError
from trinity.text.tokenizer import Tokenizer

MUCH_BYTES, ASKED_BYTES = 256 << 20, 1 << 20  # to tokenise; that could be read while a store is asked for a file
SEEDS_APART = 0x9E3779B97F4A7C15  # between those of two sources: 2^64 over the golden ratio, so they stay apart
STORES = {
    "text": token_stores,
    "chats": chat_stores,
    "pairs": answer_stores,
    "labels": answer_stores,
    "prompts": prompt_stores,
}
PACKED: dict[str, type[Packed]] = {
    "text": PackedDataset,
    "chats": PackedChats,
    "pairs": PackedPairs,
    "labels": PackedLabels,
    "prompts": PackedPrompts,
}


class Prepared(NamedTuple):
    """`val` may hold no sequence (`val.num_sequences == 0`) when the held-out documents are shorter than one."""

    tokenizer: Tokenizer
    train: Dataset
    val: Dataset


def prepare(data: DataConfig, train: TrainConfig, model: ModelConfig, out_dir: str | Path) -> Prepared:
    """Tokenizer and packed data, made under `out_dir`/data or reused from there. Safe to call from several processes.

    The tokenizer is `data.tokenizer`, else that of `train.init_from`, else trained on what is trained on. Raises ConfigError
    when it does not fit the model, or a source would be read too often; DataError when text is missing, unreadable or shorter
    than one sequence.
    """
    folder = Path(out_dir) / "data"
    tokenizer = _tokenizer(data, data.tokenizer or train.init_from, model, folder)
    if not data.sources:
        return Prepared(tokenizer, *_packed(data, train, tokenizer, folder))
    total, sides = sum(source.weight for source in data.sources), []
    for number, (source, part) in enumerate(zip(data.sources, data.parts, strict=True)):
        share = source.weight / total
        made = functools.partial(_packed, part, train, tokenizer, folder, share, number * SEEDS_APART)
        sides.append([Source(source.label, share, each, source.epochs) for each in with_name(source.label, made)])
    mixture, held_out = (Mixture(side, train.seq_len, train.seed) for side in zip(*sides, strict=True))
    mixture.check(train)
    return Prepared(tokenizer, mixture, held_out)


def _packed(
    data: DataConfig, train: TrainConfig, tokenizer: Tokenizer, folder: Path, share: float = 1.0, seed: int = 0
) -> tuple[Packed, Packed]:
    """(train, held out) of one source, which has that share of a step, and a seed of its own for its order."""
    make = functools.partial(STORES[data.format], data=data, tokenizer=tokenizer, seed=train.seed, folder=folder)
    train_store, val_store = make(data.train, val_fraction=0.0 if data.val else data.val_fraction)
    if data.val:
        val_store, _ = make(data.val, val_fraction=0.0)
    packed = _in_training(data, train, train_store, folder, share, train.seed + seed)
    held_out = PACKED[data.format](val_store, train.seq_len, train.seed)
    for dataset in (packed, held_out) if data.val else (packed,):
        dataset.require_text()
    if not held_out.num_sequences:
        logger.warning("%d held-out tokens are no sequence of %d: no validation", len(val_store.tokens), train.seq_len)
    return packed, held_out


class Work(NamedTuple):
    """Shards that `prepare` would make one by one: how, of which files, and where to."""

    recipe: Recipe
    files: list[Found]
    cache: Cache

    @property
    def is_much(self) -> bool:
        """Say whether it is worth the time that the processes of a job take to start."""
        missing = self.recipe.missing(self.files, self.cache)
        num_bytes = sum(MUCH_BYTES if found.num_bytes is None else found.num_bytes for found in missing)
        num_bytes += ASKED_BYTES * sum(isinstance(found.file, RemoteFile) for found in missing)
        return len(missing) > 1 and num_bytes >= MUCH_BYTES and self.recipe.most is None


def recipes(data: DataConfig, train: TrainConfig, model: ModelConfig, out_dir: str | Path) -> Iterator[Work]:
    """Work that `prepare` will do, for who does it beforehand (actors/jobs/tokenise.py), of each source. Raises as `prepare`
    does."""
    folder = Path(out_dir) / "data"
    tokenizer = _tokenizer(data, data.tokenizer or train.init_from, model, folder)
    for part in data.parts:
        if (recipe := _recipe(part, tokenizer)) is not None:
            files = [each for found in listed((*part.train, *part.val), folder).values() for each in found]
            yield Work(recipe, files, shards_cache(part, folder))


def _recipe(data: DataConfig, tokenizer: Tokenizer) -> Recipe | None:
    """Recipe of a source's shards; None for prompts, which are few and have none."""
    if data.format in ("pairs", "labels"):
        return AnswerRecipe(data.max_documents, tokenizer)
    kinds = {"text": TextRecipe, "chats": ChatRecipe}
    return kinds[data.format](data, tokenizer) if data.format in kinds else None


def _in_training(
    data: DataConfig, train: TrainConfig, store: TokenStore, folder: Path, share: float, seed: int
) -> Packed:
    if data.format != "text":
        return PACKED[data.format](store, train.seq_len, seed)
    found = drawn(np.diff(store.starts_N), data.length_bias, seed) if data.length_bias else None
    if data.packing == "rsdb":
        num_slots = max(1, round(share * train.global_batch_size))
        shape = train.seq_len, seed, num_slots, data.rsdb_documents
        name = f"slots-{fingerprint(store.content, len(store.tokens), *shape, found.words if found else '')}"
        return BufferedDocuments(store, *shape, found, SlotStates(folder / name))
    kind = PackedDocuments if data.packing == "best_fit" else PackedDataset
    return kind(store, train.seq_len, seed, found)


def _tokenizer(data: DataConfig, source: str | None, model: ModelConfig, folder: Path) -> Tokenizer:
    texts = [part for part in data.parts if part.format == "text"]
    if source is None and not texts:
        raise ConfigError(
            f"{data.parts[0].format} need the tokenizer and the chat template of a model; set train.init_from or data.tokenizer"
        )
    if source is None:
        facts = [fact for part in texts for fact in (_stamps(part, folder), part.text_field, part.max_documents)]
        found = itertools.chain.from_iterable(documents(p.train, p.text_field, p.max_documents) for p in texts)
        name = f"tokenizer-{fingerprint(*facts, model.vocab_size)}"
        cache = Cache.of_orders(folder, data.cache)
        source = str(cache.made(name, lambda to: Tokenizer.train(found, model.vocab_size).save(to)))
    tokenizer = Tokenizer.load(small_files(source))
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(f"tokenizer {source} has {tokenizer.vocab_size} ids; model.vocab_size is {model.vocab_size}")
    if tokenizer.eos_id is None:
        raise ConfigError(
            f"tokenizer {source} names no token that ends a document; name its own as eos_token in the tokenizer_config.json "
            "beside it"
        )
    _require_same("bos", tokenizer.bos_id, model.bos_token_id)
    _require_same("eos", tokenizer.eos_id, model.document_eos_id)
    return tokenizer.of_model(model.eos_token_ids)


def _stamps(data: DataConfig, folder: Path) -> list[list[Any]]:
    """Stamps that tell whether the files of a source have changed."""
    return [each.stamp for files in listed(data.train, folder).values() for each in files]


def _require_same(kind: str, found: int | None, wanted: int | None) -> None:
    if None not in (found, wanted) and found != wanted:
        raise ConfigError(f"the tokenizer's {kind} id is {found}; model.{kind}_token_id is {wanted}: set it to {found}")
