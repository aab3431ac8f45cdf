"""Data of a run, or of all its stages, made ready before it trains: here, or on all nodes where there is much to tokenise.

Decisions. What is made ready is what a stage will read, in its own folder and under the same names; so whatever is wrong with
the data of a later stage is named as it would be there, before the first stage takes a step. A stage has the tokenizer of the
one before, which it will find in the weights that it begins with.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from trinity.checkpoint import latest_checkpoint, small_files
from trinity.config import RUN_TOKENIZER, Config
from trinity.data.prepare import Prepared, Work, prepare, recipes
from trinity.errors import ConfigError, TrinityError
from trinity.stages import Stage
from trinity.text.tokenizer import Tokenizer
from trinity.utils.terminal import occasionally, say


def prepared(config: Config, join: Callable[[], object] = lambda: None, everywhere: bool = False) -> Prepared:
    """Tokenizer and packed data of a run. Where there is much to tokenise, or `everywhere` is asked for, all nodes of the
    cluster do that, which `join` has this process join. Raises as `prepare` does."""
    out_dir = Path(config.train.out_dir).absolute()
    where = config.data, config.train, config.model, out_dir
    for work in recipes(*where) if everywhere or latest_checkpoint(out_dir) is None else ():
        if everywhere or work.is_much:
            join()
            _tokenise(work)
    found = prepare(*where)
    found.tokenizer.save(out_dir / RUN_TOKENIZER)
    return found


def _tokenise(work: Work) -> None:
    from actors.jobs.tokenise import tokenise  # which brings Ray Data

    said = occasionally(say)
    tokenise(*work, lambda num, total: said(f"tokenised {num:,} of {total:,} files", num == total))


def prepare_stages(
    stages: Iterable[Stage], join: Callable[[], object], everywhere: bool = False
) -> Iterator[tuple[Stage, Prepared]]:
    """Make the data of stages that have not begun ready, one by one. Raises what would end one of them, with its name."""
    before: Stage | None = None
    coming = set[Path]()
    for stage in stages:
        if latest_checkpoint(stage.config.train.out_dir) is None:
            config = _with_tokenizer(stage.config, before)
            yield stage, _named(stage, partial(_ready, config, coming, partial(prepared, config, join, everywhere)))
        coming |= {stage.checkpoint, *([stage.export] if stage.export else [])}
        before = stage


def _named(stage: Stage, make: Callable[[], Prepared]) -> Prepared:
    try:
        return make()
    except TrinityError as error:
        raise type(error)(f"stage {stage.name!r}: {error.message}") from None


def _ready(config: Config, coming: set[Path], make: Callable[[], Prepared]) -> Prepared:
    found = make()
    for name, teacher in (("distill", config.distill.teacher), ("rl", config.rl.teacher)):
        if teacher is not None and Path(teacher) not in coming:
            _check_teacher(name, teacher, found.tokenizer)
    return found


def _check_teacher(name: str, teacher: str, tokenizer: Tokenizer) -> None:
    if Tokenizer.load(small_files(teacher)).to_json() != tokenizer.to_json():
        raise ConfigError(f"{name}.teacher {teacher} has another tokenizer; a teacher shares it")


def _with_tokenizer(config: Config, before: Stage | None) -> Config:
    """The settings with the tokenizer that the stage will find, where the weights that it begins with are not there yet."""
    if before is None or config.data.tokenizer:
        return config
    folder = before.config.train.out_dir
    source = latest_checkpoint(folder) or Path(folder).absolute() / RUN_TOKENIZER
    return config.replace(data={"tokenizer": str(source)})
