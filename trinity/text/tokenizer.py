"""Tokenizers: train, load, save, encode and decode.

Decisions.
- Only byte-level BPE, the family's kind: every string round-trips, and a token is a fixed run of bytes. So text is
  joined from bytes here, which lets a stream hold back exactly the unfinished UTF-8 character and nothing more.
- Every pattern is linear in the text. Digits are cut in threes from the right by taking the 1 or 2 leading digits off
  first, and not by looking ahead at each cut, which is quadratic: a megabyte of digits would stall a server.
- Special tokens written in a text are read as special tokens, as everywhere in the family; ChatML depends on it.
- `add_special` follows the checkpoint's own post-processor (ours puts bos first); chat templates write theirs out.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from trinity.errors import CheckpointError, ConfigError, InvalidRequest
from trinity.text.added_tokens import add_lacking, merged_config, special_names
from trinity.text.chat_template import CHATML
from trinity.text.special_tokens import BOS, MARKERS, SPECIALS

SAMPLE_CHARS = 20_000_000
PIECE_CHARS = 1 << 20
MAX_TOKENS = 1 << 22  # sixteen times the largest vocabulary that is known; a table has an entry for each
MAX_FILE_BYTES = 256 << 20
MAX_CONFIG_BYTES = 64 << 20  # of the files beside it: some list each added token
MAX_TEMPLATE_CHARS = 1 << 20  # fifty times the longest that is known; it goes to a process with each chat


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE with the family's pre-tokenizer and special ids (bos 0, eos 3, pad 12), trained on the first
    min(2048 x vocab_size, 20 million) characters of `texts`. Deterministic. May have fewer tokens than `vocab_size`
    when the text yields fewer merges. Raises ConfigError below 269 (13 special tokens and 256 bytes)."""
    smallest = len(SPECIALS) + 256
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size {vocab_size} < {smallest}, the special tokens and bytes; raise model.vocab_size")
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = _pre_tokenizer()
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(name, normalized=False) for name in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_first_chars(texts, min(2048 * vocab_size, SAMPLE_CHARS)), trainer)
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, SPECIALS.index(BOS))])
    return _with_visible_markers(core)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """The three steps of llama.cpp's AFMoE (its pull request 16477): digits, scripts without spaces, words."""
    digits = [r"\p{Nd}+", r"\A\p{Nd}{1,2}(?=(?>(?:\p{Nd}{3})+)\z)", r"\p{Nd}{3}"]
    scripts = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Hangul}]+"
    words = (
        r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (*digits, scripts, words)]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _first_chars(texts: Iterator[str], limit: int) -> Iterator[str]:
    """Documents until `limit` characters are reached, the last one cut there."""
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


def _with_visible_markers(core: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Thinking and tool markers are single tokens that stay in the text; the trainer made all of its tokens special."""
    tree = json.loads(core.to_str())
    for token in tree["added_tokens"]:
        token["special"] = token["content"] not in MARKERS
    return tokenizers.Tokenizer.from_str(json.dumps(tree))


def cut(text: str) -> list[str]:
    """`text` in pieces of at most a million characters: its regular expressions give up on a blank of ten million."""
    return [text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)] or [""]


class Tokenizer:
    """A byte-level tokenizer with its special tokens ("", and no id, for one that it lacks) and its checkpoint's chat template
    (None: it has none).

    `vocab_size` is the number of embedding rows it needs: the highest id plus one. `end_ids` are eos and those that end a text
    of its model besides. Safe to share between threads.
    """

    def __init__(self, core: tokenizers.Tokenizer, config: Mapping[str, Any], chat_template: str | None):
        self._core = core
        self.token_bytes = _token_bytes(core)
        self._config = config
        self.chat_template = chat_template
        self.bos_token, self.eos_token, self.pad_token = special_names(config, core)
        self.bos_id, self.eos_id = self._id(self.bos_token), self._id(self.eos_token)
        self.vocab_size = len(self.token_bytes)
        added = core.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.added_ids = {token.content: i for i, token in added.items()}
        self.end_ids = frozenset[int]() if self.eos_id is None else frozenset([self.eos_id])

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> "Tokenizer":
        """`train_tokenizer` with the family's chat template."""
        return cls(train_tokenizer(texts, vocab_size), {}, CHATML)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a checkpoint folder or a tokenizer.json in one, with tokenizer_config.json, special_tokens_map.json,
        added_tokens.json and chat_template.jinja beside it: ids are those that transformers gives. Raises ConfigError if
        `path` is missing, CheckpointError for its content."""
        file = Path(path).expanduser()
        if not file.exists():
            raise ConfigError(f"tokenizer {file} does not exist; give a tokenizer.json or a checkpoint folder")
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; a checkpoint folder needs its tokenizer.json")
        text = _text_of(file, MAX_FILE_BYTES)
        try:
            core = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file} is not a tokenizer.json: {error}") from None
        config = _read_config(file.parent)
        core.no_truncation()  # of somebody's training run
        core.no_padding()
        core.encode_special_tokens = config.get("split_special_tokens") is True
        add_lacking(core, config, _read_object(file.parent / "added_tokens.json"))
        return cls(core, config, read_template(file.parent))

    def of_model(self, eos_token_ids: Iterable[int]) -> "Tokenizer":
        """The same for a model whose texts end with any of these, too."""
        found = copy(self)
        found.end_ids = self.end_ids.union(eos_token_ids)
        return found

    def save(self, folder: str | Path) -> None:
        """Write the files that `load` and transformers' AutoTokenizer read. Not atomic; a checkpoint's manifest is."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}
        names = {key: name or None for key, name in kept.items()}
        base = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config = base | {k: v for k, v in self._config.items() if k not in ("chat_template", "auto_map")} | names
        (folder / "tokenizer.json").write_text(self.to_json(), "utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")
        (folder / "special_tokens_map.json").write_text(
            json.dumps({key: name for key, name in kept.items() if name}, indent=2), "utf-8"
        )
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, "utf-8")

    def to_json(self) -> str:
        """The content of tokenizer.json: two tokenizers with the same text encode alike."""
        return self._core.to_str()

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of `text`; `add_special` puts what the checkpoint's post-processor adds (bos). Raises InvalidRequest
        for half a surrogate pair, which is no character."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"text has a lone surrogate at character {error.start}; send valid Unicode") from None
        head, *rest = cut(text)
        return list(chain(*self.encode_batch([head], add_special), *self.encode_batch(rest)))

    def encode_batch(self, texts: Sequence[str], add_special: bool = False) -> list[list[int]]:
        """Ids of each of many valid texts, on as many threads as the tokenizers library has."""
        return [found.ids for found in self._core.encode_batch_fast(texts, add_special_tokens=add_special)]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids beyond the vocabulary are nothing."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int], skip_special: bool = False) -> bytes:
        """Bytes of `ids`, which may end within a character."""
        skipped = self.special_ids if skip_special else frozenset[int]()
        if skipped or not 0 <= min(ids, default=0) <= max(ids, default=0) < len(self.token_bytes):
            ids = [i for i in ids if 0 <= i < len(self.token_bytes) and i not in skipped]
        return b"".join(map(self.token_bytes.__getitem__, ids))

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; None where there is none."""
        return self._core.token_to_id(token)

    def _id(self, token: str) -> int | None:
        found = self.id_of(token) if token else None
        if token and found is None:
            raise CheckpointError(f"tokenizer has no token {token[:100]!r}; name its own in tokenizer_config.json")
        return found


def _token_bytes(core: tokenizers.Tokenizer) -> list[bytes]:
    """id -> its bytes, b"" where there is no token. Raises CheckpointError unless the tokenizer is byte-level."""
    if not isinstance(core.decoder, decoders.ByteLevel):
        raise CheckpointError(f"tokenizer decodes with {core.decoder}; only byte-level tokenizers are supported")
    byte_of = _byte_alphabet()
    added = {i: token.content for i, token in core.get_added_tokens_decoder().items()}
    vocabulary = core.get_vocab(with_added_tokens=True)
    highest = max(vocabulary.values(), default=-1)
    if highest >= MAX_TOKENS:
        raise CheckpointError(
            f"tokenizer has token id {highest:,} for {len(vocabulary):,} tokens; ids below {MAX_TOKENS:,} are taken"
        )
    table = [b""] * (highest + 1)
    for token, i in vocabulary.items():
        known = [byte_of[char] for char in takewhile(byte_of.__contains__, token)]
        table[i] = bytes(known) if len(known) == len(token) and i not in added else token.encode("utf-8")
    return table


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes printable bytes as themselves and the others, in order, as characters from U+0100 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    itself = {char: ord(char) for char in alphabet if ord(char) < 256}
    hidden = sorted(set(range(256)) - set(itself.values()))
    return itself | dict(zip(alphabet[len(itself) :], hidden, strict=True))


def _text_of(file: Path, most_bytes: int) -> str:
    try:
        if (size := file.stat().st_size) > most_bytes:
            raise CheckpointError(f"{file} has {size:,} bytes; it may have {most_bytes:,}")
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from None


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        tree = json.loads(_text_of(file, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file} must hold an object, found {type(tree).__name__}")
    return tree


def _read_config(folder: Path) -> dict[str, Any]:
    files = ("tokenizer_config.json", "special_tokens_map.json")
    return merged_config(*(_read_object(folder / file) for file in files))


def read_template(folder: str | Path) -> str | None:
    """chat_template.jinja of a checkpoint, or the older `chat_template` of tokenizer_config.json: a text or a list of named
    ones. Raises CheckpointError for what is no text, or a longer one than there may be."""
    folder = Path(folder)
    file = folder / "chat_template.jinja"
    found = _text_of(file, 4 * MAX_TEMPLATE_CHARS) if file.is_file() else _read_config(folder).get("chat_template")
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict)]
        found = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"the chat template in {folder} is a {type(found).__name__}; a text is wanted")
    if found and len(found) > MAX_TEMPLATE_CHARS:
        raise CheckpointError(
            f"the chat template in {folder} has {len(found):,} characters, at most {MAX_TEMPLATE_CHARS:,}"
        )
    return found
