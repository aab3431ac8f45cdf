"""Text for training: find documents, tokenise them once, and cut them into sequences by (seed, step) alone.

Decision: sequence i is tokens [i S, i S + S] of all documents laid end to end (its last token is only a target), so an epoch
sees each token once but for a last part shorter than a sequence. Documents are not padded; `docs_BS` tells which tokens may
see each other.
"""

import functools
from pathlib import Path
from typing import NamedTuple

from trinity.checkpoint import small_files
from trinity.config import DataConfig, ModelConfig, TrainConfig
from trinity.data.answers import PackedLabels, PackedPairs
from trinity.data.chat_store import chat_stores
from trinity.data.dataset import Packed, PackedDataset
from trinity.data.documents import documents, stamps
from trinity.data.packed_chats import PackedChats
from trinity.data.pairs import answer_stores
from trinity.data.prompts import PackedPrompts, prompt_stores
from trinity.data.rsdb import BufferedDocuments
from trinity.data.token_store import TokenStore, fingerprint, logger, made_once, token_stores
from trinity.errors import ConfigError
from trinity.text.tokenizer import Tokenizer

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
    train: Packed
    val: Packed


def prepare(data: DataConfig, train: TrainConfig, model: ModelConfig, out_dir: str | Path) -> Prepared:
    """Tokenizer and packed data, made under `out_dir`/data or reused from there. Safe to call from several processes.

    The tokenizer is `data.tokenizer`, else that of `train.init_from`, else trained on `data.train`. Raises ConfigError
    when it does not fit the model, DataError when text is missing, unreadable or shorter than one sequence.
    """
    folder = Path(out_dir) / "data"
    tokenizer = _tokenizer(data, data.tokenizer or train.init_from, model, folder)
    make = functools.partial(STORES[data.format], data=data, tokenizer=tokenizer, seed=train.seed, folder=folder)
    train_store, val_store = make(data.train, val_fraction=0.0 if data.val else data.val_fraction)
    if data.val:
        val_store, _ = make(data.val, val_fraction=0.0)
    held_out = PACKED[data.format](val_store, train.seq_len, train.seed)
    packed = [_in_training(data, train, train_store), held_out]
    for dataset in packed if data.val else packed[:1]:
        dataset.require_text()
    if not packed[1].num_sequences:
        logger.warning("%d held-out tokens are no sequence of %d: no validation", len(val_store.tokens), train.seq_len)
    return Prepared(tokenizer, *packed)


def _in_training(data: DataConfig, train: TrainConfig, store: TokenStore) -> Packed:
    if data.format == "text" and data.packing == "rsdb":
        return BufferedDocuments(store, train.seq_len, train.seed, train.global_batch_size, data.rsdb_documents)
    return PACKED[data.format](store, train.seq_len, train.seed)


def _tokenizer(data: DataConfig, source: str | None, model: ModelConfig, folder: Path) -> Tokenizer:
    if source is None and data.format not in ("text", "prompts"):
        raise ConfigError(
            f"{data.format} need the tokenizer and the chat template of a model; set train.init_from or data.tokenizer"
        )
    if source is None:
        name = f"tokenizer-{fingerprint(stamps(data.train), data.text_field, data.max_documents, model.vocab_size)}"
        texts = documents(data.train, data.text_field, data.max_documents)
        source = str(made_once(folder / name, lambda to: Tokenizer.train(texts, model.vocab_size).save(to)))
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
    return tokenizer


def _require_same(kind: str, found: int | None, wanted: int | None) -> None:
    if None not in (found, wanted) and found != wanted:
        raise ConfigError(f"the tokenizer's {kind} id is {found}; model.{kind}_token_id is {wanted}: set it to {found}")
