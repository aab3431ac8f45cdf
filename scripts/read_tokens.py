"""How quickly sequences are read from tokenised shards, beside one array with the same documents in the same order.

    .venv/bin/python scripts/read_tokens.py [--shards 64] [--tokens 50000000] [--seq-len 4096]

Documents have log-normal lengths (median 400 tokens), as of the web. One thread; files are in the page cache.
"""

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from trinity.data.dataset import PackedDataset
from trinity.data.rsdb import BufferedDocuments
from trinity.data.shards import TOKENS, Shard
from trinity.data.token_store import SourceShards, TokenStore, write_documents, write_order

BATCH = 16


def shard_of(folder: Path, num_tokens: int, rng: np.random.Generator) -> Shard:
    lengths = np.maximum(rng.lognormal(np.log(400), 1.2, num_tokens // 800).astype(np.int64), 2)
    folder.mkdir()
    rng.integers(0, 50_000, int(lengths.sum()), np.uint32).tofile(folder / TOKENS[0])
    np.save(folder / "lengths.npy", lengths)
    np.save(folder / "digests.npy", rng.integers(0, 2**64, len(lengths), np.uint64))
    (folder / "shard.json").write_text('{"left_out": {}}')
    return Shard(folder)


def rate(dataset: PackedDataset | BufferedDocuments) -> float:
    """Million tokens a second, in the best of three runs."""
    found = []
    for again in range(3):
        start, num = time.process_time(), 0
        for step in range(40):
            num += dataset.take(dataset.sequences(again * 40 + step, BATCH)).ids_BS.numel()
        found.append(num / (time.process_time() - start) / 1e6)
    return max(found)


def main() -> None:
    given = argparse.ArgumentParser()
    for name, default in (("shards", 64), ("tokens", 50_000_000), ("seq-len", 4096)):
        given.add_argument(f"--{name}", type=int, default=default)
    settings = given.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, rng = Path(scratch), np.random.default_rng(0)
        each = settings.tokens // settings.shards
        shards = [shard_of(folder / f"shard-{n}", each, rng) for n in range(settings.shards)]
        start = time.process_time()
        (folder / "store").mkdir()
        write_order(folder / "store", [SourceShards("", shards)], 0.0, 0)
        took = time.process_time() - start
        store = TokenStore(folder / "store" / "train")
        pieces = [store.tokens[a:b] for a, b in pairwise(store.starts_N)]
        write_documents(folder / "one", pieces, np.diff(store.starts_N))
        print(f"{len(store.tokens):,} tokens of {len(pieces):,} documents; ordered in {took:.2f} s")
        for name, found in (("one array", TokenStore(folder / "one")), (f"{settings.shards} shards", store)):
            stream = rate(PackedDataset(found, settings.seq_len, 0))
            rsdb = rate(BufferedDocuments(found, settings.seq_len, 0, BATCH, 256))
            print(f"{name:>12}: stream {stream:6.1f} M tokens/s, rsdb {rsdb:6.1f}")


if __name__ == "__main__":
    main()
