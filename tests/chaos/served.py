"""A server of a small model whose tokenizer and grammars are real, in the Ray of this process."""

import uuid
from contextlib import contextmanager

from tests.serve.fake import fake_tokenizer
from tests.unit.grammar_cases import checkpoint
from trinity.checkpoint import open_checkpoint
from trinity.config import Config

ENGINE = {
    "max_model_len": 512,
    "kv_cache_bytes": 16 << 20,
    "max_num_seqs": 128,
    "max_draft_tokens": 0,  # an event is a token, whoever goes on with it
}


@contextmanager
def serving(folder, serve, **engine):
    """-> the server, with these settings of `serve` and of its engines."""
    from actors import pool as pools
    from serving import app
    from serving.launch import provide_pool

    path = checkpoint(folder / "model", fake_tokenizer())
    tree = {
        "model": open_checkpoint(path).config.model_dump(),
        "placement": {"pool": f"chaos-{uuid.uuid4().hex[:8]}", "num_shards": 2, "call_timeout_s": 60},
        "serve": serve,
        "engine": {**ENGINE, **engine},
    }
    config = Config.from_tree(tree)
    provide_pool(config, str(path))
    server = app.start(config, str(path))
    yield server
    server.stop()
    pools.destroy(config.placement.pool, config.cluster.namespace)
