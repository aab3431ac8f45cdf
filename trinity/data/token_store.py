"""Documents as tokens on disk, in one order over the shards of all files (shards.py).

Legend: N documents, H shards.

Decisions.
- Documents are bos, text, eos, in the order of seeded hashes of their content: shuffled, and the same however files are called,
  listed and cut. `content` tells two stores apart; a run goes on with its own alone.
- What is made here is the order only: where each document begins in the shards, whose tokens are not copied. A store of an
  older release, which holds its tokens itself, is read as it is.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trinity.config import DataConfig
from trinity.data.cache import Build, Cache
from trinity.data.documents import Found, say_left_out, texts_of
from trinity.data.kept import fingerprint
from trinity.data.listing import listed
from trinity.data.shards import TOKENS, TRAINED, Gathered, Order, Recipe, Shard, damaged, keys_of, mapped
from trinity.errors import DataError
from trinity.text.tokenizer import Tokenizer, cut

BATCH_CHARS = 4 << 20  # tokenised at a time; longer documents in pieces, so that memory stays bounded
CHUNK = 1 << 22  # tokens hashed at a time
NO_TEXT = "text: every document is empty"


logger = logging.getLogger(__name__)


class TokenStore:
    """Tokenised documents in `folder`: `tokens` uint32 (memory-mapped), document n at starts_N[n] : starts_N[n + 1]; `trained`
    bool says of each whether it is a target, None: all are."""

    tokens: Any
    trained: Any

    def __init__(self, folder: Path):
        try:
            self.starts_N = np.asarray(np.load(folder / "starts.npy", mmap_mode="r"))
            self.content = (folder / "content").read_text() if (folder / "content").is_file() else ""
            self.tokens, self.trained = _sides(folder, self.starts_N)
        except (OSError, ValueError, KeyError) as error:
            raise damaged(folder, error) from None


def _sides(folder: Path, starts_N: np.ndarray) -> tuple[Any, Any]:
    """(tokens, trained) of a store whose tokens lie in shards, or beside it."""
    if (folder / "places.npy").is_file():
        places_N = np.asarray(np.load(folder / "places.npy", mmap_mode="r"))
        shards = json.loads((folder.parent / "shards.json").read_text())
        sides = [TOKENS, TRAINED] if shards[0]["has_trained"] else [TOKENS]
        found = [[mapped(folder.parent / each["folder"], side, each["tokens"]) for each in shards] for side in sides]
        gathered = [Gathered(parts, starts_N, places_N) for parts in found]
        return gathered[0], gathered[1] if len(gathered) > 1 else None
    has_some = (folder / "trained.npy").is_file()
    return (
        np.load(folder / "tokens.npy", mmap_mode="r"),
        np.load(folder / "trained.npy", mmap_mode="r") if has_some else None,
    )


class SourceShards(NamedTuple):
    """Files that one pattern means, as shards."""

    pattern: str
    shards: list[Shard]

    @property
    def note(self) -> dict[str, Any]:
        left_out = sum((shard.left_out for shard in self.shards), Counter[str]())
        num = sum(len(shard.lengths_N) for shard in self.shards)
        return {"source": self.pattern, "files": len(self.shards), "documents": num, "left_out": left_out}


class TextRecipe(Recipe):
    """Texts, each between bos and eos."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer):
        self.field, self.most, self.tokenizer = data.text_field, data.max_documents, tokenizer

    @cached_property
    def facts(self) -> list[Any]:
        return ["text", self.field, self.most, fingerprint(self.tokenizer.to_json()), self.tokenizer.bos_id]

    def write(self, found: Found, to: Path) -> tuple[Sequence[int], Sequence[int], Counter[str]]:
        left_out = Counter[str]()
        texts = islice(texts_of(found, self.field, left_out), self.most)
        return *_tokenise(texts, self.tokenizer, to / TOKENS[0]), left_out


def token_stores(
    patterns: Sequence[str], data: DataConfig, tokenizer: Tokenizer, val_fraction: float, seed: int, folder: Path
) -> tuple[TokenStore, TokenStore]:
    """-> (train, held out), tokenised into `folder` unless they are there already. Raises DataError."""
    found = listed(patterns, folder)
    stamps = [each.stamp for pattern in patterns for each in found[pattern]]
    facts = [stamps, data.text_field, data.max_documents, tokenizer.to_json(), val_fraction, seed]
    facts += ["without bos"] if tokenizer.bos_id is None else []
    recipe = TextRecipe(data, tokenizer)
    for form in (1, 2):  # of a run that began with an older release
        if (before := folder / f"tokens-{fingerprint(*facts, form=form)}").is_dir():
            return TokenStore(before / "train"), TokenStore(before / "val")
    return made_stores(
        f"tokens-{fingerprint(*facts)}",
        lambda to: write_order(to, _sources(found, recipe, data, folder), val_fraction, seed, data.max_documents),
        data,
        folder,
    )


def made_stores(name: str, build: Build, data: DataConfig, folder: Path) -> tuple[TokenStore, TokenStore]:
    """The two sides of the store of that name in `folder`, made unless it is there, with its shards; says what was left out."""
    shards, orders = shards_cache(data, folder), Cache.of_orders(folder, data.cache)
    if (folder / name).is_dir():  # maybe of a time before it was shared, or of shards that lie elsewhere here
        names, are_own = _shards_of(folder / name)
        shards.share(names)
        orders = orders if are_own else Cache(folder)
    folder = orders.made(name, build)
    shards.fetch(_shards_of(folder)[0])
    for note in json.loads((folder / "skipped.json").read_text()):
        say_left_out(note["source"], Counter(note["left_out"]))
    return TokenStore(folder / "train"), TokenStore(folder / "val")


def _shards_of(store: Path) -> tuple[list[str], bool]:
    """(names of the shards that a store is of, whether all lie below the run's folder)."""
    folders = [Path(each["folder"]) for each in json.loads((store / "shards.json").read_text())]
    return [folder.name for folder in folders], not any(folder.is_absolute() for folder in folders)


def shards_cache(data: DataConfig, folder: Path) -> Cache:
    return Cache.of_shards(folder, data.cache)


def _sources(
    found: dict[str, list[Found]], recipe: TextRecipe, data: DataConfig, folder: Path
) -> Iterator[SourceShards]:
    """Shards of the files, made unless they are there; no more files than `data.max_documents` needs."""
    room, cache = data.max_documents, shards_cache(data, folder)
    for pattern, files in found.items():
        shards = []
        for shard in recipe.all_made(files, cache) if room is None or room > 0 else ():
            shards.append(shard)
            room = None if room is None else room - len(shards[-1].lengths_N)
            if room is not None and room <= 0:
                break
        yield SourceShards(pattern, shards)


def write_order(
    folder: Path,
    sources: Iterable[SourceShards],
    val_fraction: float,
    seed: int,
    most: int | None = None,
    what: str = NO_TEXT,
) -> None:
    """Write the order of the documents of each side, `most` of all at most, and what was left out. Raises DataError."""
    sources = list(sources)
    shards = [shard for source in sources for shard in source.shards]
    lengths_N = np.concatenate([np.empty(0, np.int64), *(shard.lengths_N for shard in shards)])
    digests_N = np.concatenate([np.empty(0, np.uint64), *(shard.digests_N for shard in shards)])
    if not len(digests_N):
        raise DataError(f"the data holds no {what}; check data.train and data.val")
    keys_N = keys_of(digests_N[:most], seed)
    order_N = np.argsort(keys_N, kind="stable")
    unique, rows_N = np.unique(keys_N, return_inverse=True)  # what has one key stays together
    held_N = split(unique, val_fraction)[rows_N][order_N]
    at = [_entry(shard, folder) for shard in shards]
    (folder / "shards.json").write_text(json.dumps(at, indent=1))
    (folder / "skipped.json").write_text(json.dumps([source.note for source in sources], indent=1))
    for name, chosen in (("train", order_N[~held_N]), ("val", order_N[held_N])):
        _write_side(folder / name, Order.of(lengths_N, chosen))


def _entry(shard: Shard, store: Path) -> dict[str, Any]:
    """A shard as a store names it: below the run's folder by its way from here, so that this may be moved; else in full."""
    is_own = shard.folder.is_relative_to(store.parent)
    at = os.path.relpath(shard.folder, store) if is_own else str(shard.folder.absolute())
    return {"folder": at, "tokens": shard.num_tokens, "has_trained": shard.has_trained}


def _write_side(folder: Path, order: Order) -> None:
    folder.mkdir()
    np.save(folder / "starts.npy", order.starts_N)
    np.save(folder / "places.npy", order.places_N)
    content = hashlib.blake2b(order.starts_N.tobytes(), digest_size=16)
    store = TokenStore(folder)
    for side in filter(lambda side: side is not None, (store.tokens, store.trained)):
        for begin in range(0, len(side), CHUNK):
            content.update(side[begin : begin + CHUNK].data)
    (folder / "content").write_text(content.hexdigest())


def split(keys_N: np.ndarray, val_fraction: float) -> np.ndarray:
    """-> bool: which documents are held out, given seeded 64-bit hashes of their content: those in the lowest
    `val_fraction` of the hashes' range, so equal documents share a side and new ones move no other. But where there
    are two documents or more, each side gets one (`val_fraction` 0: all train)."""
    wanted = np.count_nonzero(keys_N < val_fraction * 2.0**64)
    num_val = min(max(wanted, 1), len(keys_N) - 1) if val_fraction else 0
    held_N = np.zeros(len(keys_N), bool)
    held_N[np.argsort(keys_N, kind="stable")[:num_val]] = True
    return held_N


class _Piece(NamedTuple):
    text: str
    is_first: bool
    digest: int | None  # of the document, with its last piece


def _pieces(texts: Iterator[str]) -> Iterator[_Piece]:
    for text in texts:
        *rest, last = (_Piece(piece, i == 0, None) for i, piece in enumerate(cut(text)))
        yield from (*rest, last._replace(digest=_digest(text)))


def _digest(text: str) -> int:
    """A hash of the text, 64 bits; by an older release's salt, 0, so that its orders stay."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, salt=bytes(8)).digest(), "little")


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenise(texts: Iterator[str], tokenizer: Tokenizer, raw: Path) -> tuple[list[int], list[int]]:
    """Write all tokens to `raw`; -> lengths_N and digests_N."""
    ends, digests = [0], list[int]()
    begin, end = ([] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id))
    with raw.open("wb") as out:
        for batch in _batches(_pieces(texts)):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
                bos, eos = begin * piece.is_first, end * (piece.digest is not None)
                np.array(bos + ids + eos, np.uint32).tofile(out)
                if piece.digest is not None:
                    ends.append(out.tell() // 4)
                    digests.append(piece.digest)
    return [b - a for a, b in pairwise(ends)], digests


def write_documents(
    folder: Path, documents: Iterable[np.ndarray], lengths_N: np.ndarray, trained: Iterable[np.ndarray] | None = None
) -> None:
    """Write what a TokenStore reads: uint32 tokens of documents of these lengths, and for each whether it is trained."""
    folder.mkdir(parents=True, exist_ok=True)
    starts_N = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64)
    np.save(folder / "starts.npy", starts_N)
    content = hashlib.blake2b(starts_N.tobytes(), digest_size=16)
    _write(folder / "tokens.npy", "<u4", documents, int(starts_N[-1]), content.update)
    if trained is not None:
        _write(folder / "trained.npy", "|b1", trained, int(starts_N[-1]), content.update)
    (folder / "content").write_text(content.hexdigest())


def _write(file: Path, kind: str, pieces: Iterable[np.ndarray], num: int, told: Callable[[memoryview], object]) -> None:
    """One array of all pieces, which are never held together; `told` hears of their bytes."""
    with file.open("wb") as out:
        np.lib.format.write_array_header_1_0(out, {"descr": kind, "fortran_order": False, "shape": (num,)})
        for piece in pieces:
            told(np.ascontiguousarray(piece).data)
            piece.tofile(out)
