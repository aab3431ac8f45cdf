"""Models on the Hugging Face Hub: a name stands for a folder of the Hub's cache on this node, which fills as it is read.

Decisions: `huggingface_hub` does the work, so that cache, tokens, mirrors, offline mode and progress bars are those of its own
commands. A name is resolved to a commit once, by whoever was given it; all processes are told ORG/NAME@COMMIT and read the
same, whatever is uploaded meanwhile. Opening a model fetches its small files; a file of weights is fetched by the node that
reads from it: each gets the files with its own experts, and none where nodes share a cache. A folder here wins over a name.
"""

import glob
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from os.path import expanduser
from pathlib import Path
from typing import NamedTuple

from trinity.adapters import peft
from trinity.checkpoint.layout import INDEX, MANIFEST, MODELOPT
from trinity.errors import CheckpointError

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
SMALL = (  # what a model is opened with; weights are asked for by name
    "config.json",
    "generation_config.json",
    MODELOPT,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    peft.CONFIG,
    INDEX,
    MANIFEST,
)


class HubName(NamedTuple):
    """ORG/NAME[@REVISION]: a branch, a tag or a commit; None is the model's own default."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def hub_name(source: str | Path) -> HubName | None:
    """The name that `source` has the form of; None where it can only be a path."""
    repo, at, revision = str(source).partition("@")
    is_name = NAME.fullmatch(repo) and bool(revision) == bool(at)
    return HubName(repo, revision or None) if is_name else None


def located(source: str | Path) -> str:
    """Return by what any process finds a checkpoint: the absolute path of a file or folder here, else ORG/NAME@COMMIT.

    Asks the Hub which commit a revision is. Raises CheckpointError where there is neither, and where the Hub says no.
    """
    path, name = Path(expanduser(source)), hub_name(source)
    if path.exists():
        return str(path.resolve())
    if name is None:
        raise CheckpointError(_no_folder(source))
    if name.revision is not None and COMMIT.fullmatch(name.revision):
        return str(name)
    from huggingface_hub import HfApi

    with _asking(name, f"there is no folder {source} here"):
        return str(HubName(name.repo, HfApi().resolve_revision(name.repo, revision=name.revision).resolved))


def folder_of(source: str | Path) -> "Folder":
    """The files of a checkpoint, by a path or a name. Raises CheckpointError as `located`."""
    path = Path(expanduser(source))
    if path.is_dir():
        return Folder(path)
    name = None if path.exists() else hub_name(source)
    if name is None:
        raise CheckpointError(_no_folder(source))
    name = hub_name(located(source))
    assert name is not None
    return _snapshot(name)


def small_files(source: str | Path) -> Path:
    """Return a path as it is, and for a name the folder with what comes beside the weights: tokenizer, template, settings."""
    path = Path(expanduser(source))
    return path if path.exists() or hub_name(source) is None else folder_of(source).path


def title_of(source: str | Path) -> str:
    """Name of a model where nobody gave it a name: ORG/NAME, or its folder's."""
    name = None if Path(source).exists() else hub_name(source)
    return name.repo if name else Path(source).name


class Folder:
    """The files of a checkpoint in a folder of this node. `name`: by what another process finds it."""

    def __init__(self, path: Path):
        self.path, self.name = path, str(path.resolve())

    def has(self, file: str) -> bool:
        return (self.path / file).is_file()

    def size(self, file: str) -> int:
        """Bytes of a file, 0 where there is none."""
        path = self.path / file
        return path.stat().st_size if path.is_file() else 0

    def has_pickles(self) -> bool:
        return any(self.path.glob("*.bin")) or any(self.path.glob("*.pt"))

    def fetch(self, files: Iterable[str]) -> None:
        """See that these are on this node's disk, as far as there are such. Harmless when repeated, in any process."""


class Snapshot(Folder):
    """A model of the Hub at a commit: `path` holds what has been asked for, `sizes` tells of all files that there are."""

    def __init__(self, name: HubName):
        from huggingface_hub import get_cached_repo_tree, snapshot_download
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        self.hub = name
        with _asking(name):
            super().__init__(Path(snapshot_download(name.repo, revision=name.revision, allow_patterns=list(SMALL))))
        self.name = str(name)
        try:
            self.sizes = {file.path: file.size for file in get_cached_repo_tree(name.repo, revision=name.revision)}
        except CachedRepoTreeNotFoundError:  # a cache from elsewhere, without a network: there is what there is
            self.sizes = {}

    def has(self, file: str) -> bool:
        return file in self.sizes or super().has(file)

    def size(self, file: str) -> int:
        return super().size(file) or self.sizes.get(file, 0)

    def has_pickles(self) -> bool:
        return any(file.endswith((".bin", ".pt")) for file in self.sizes) or super().has_pickles()

    def fetch(self, files: Iterable[str]) -> None:
        """Raises CheckpointError where the disk has no room for them, with both numbers, and where the Hub says no."""
        missing = sorted(file for file in set(files) if file in self.sizes and not Folder.has(self, file))
        if not missing:
            return
        self._check_room(sum(self.sizes[file] for file in missing))
        from huggingface_hub import snapshot_download

        with _asking(self.hub):
            snapshot_download(self.hub.repo, revision=self.hub.revision, allow_patterns=[*map(glob.escape, missing)])

    def _check_room(self, wanted: int) -> None:
        free = shutil.disk_usage(self.path).free
        if wanted > free:
            raise CheckpointError(
                f"{self.name}: {wanted:,} bytes are to be fetched, and the Hub's cache {_cache()} has room for {free:,}; free "
                "some, or set HF_HOME to a folder on a larger disk"
            )


@cache
def _snapshot(name: HubName) -> Snapshot:
    """One for a process: opened again, it asks nobody."""
    return Snapshot(name)


def _no_folder(source: str | Path) -> str:
    what = "is a file" if Path(source).exists() else "does not exist"
    return f"checkpoint folder {source} {what}; a model on the Hugging Face Hub is named ORG/NAME or ORG/NAME@REVISION"


def _cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


@contextmanager
def _asking(name: HubName, before: str | None = None) -> Iterator[None]:
    """The Hub's errors, and the disk's, as ours."""
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, RevisionResolutionError

    try:
        yield
    except (OSError, HTTPError, EntryNotFoundError, RevisionResolutionError) as error:
        raise CheckpointError(f"{before or f'cannot fetch {name}'}, and {_reason(error, name)}") from None


def _reason(error: Exception, name: HubName) -> str:
    """The obstacle, and what to do."""
    from huggingface_hub import constants, errors, is_offline_mode

    hub, token = constants.ENDPOINT, "`hf auth login`, or HF_TOKEN"
    match error:
        case errors.GatedRepoError():
            return f"the model is gated: ask for access at {hub}/{name.repo}, then give your token ({token})"
        case errors.RepositoryNotFoundError():
            return f"{hub} has no model {name.repo} that you may see; check the name; a private one needs a token ({token})"
        case errors.RevisionNotFoundError():
            return f"{hub}/{name.repo} has no revision {name.revision!r}; name a branch, a tag or a commit"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"{hub} does not take your token; give another ({token})"
        case errors.HfHubHTTPError():
            return f"{hub} answered {error.response.status_code}; try again later"
        case OSError() if error.errno is not None and not isinstance(error, ConnectionError):
            return f"the Hub's cache {_cache()} cannot be written ({error.strerror}); set HF_HOME to a folder with room"
        case _ if is_offline_mode():
            return f"HF_HUB_OFFLINE is set and {name} is not in the cache {_cache()}; fetch it where there is a network"
    cause = error.__cause__ or error
    return (
        f"{hub} cannot be reached ({type(cause).__name__}), nor is {name} in the cache {_cache()}; check the network and its "
        "proxy, or set HF_ENDPOINT to a mirror"
    )
