"""Units of systemd in clusters/, as a shell would run them, and the environment that they name."""

from collections import defaultdict
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "clusters"


def settings(name: str) -> dict[str, list[str]]:
    """Key -> its values in order, of all sections: a key may be there twice."""
    found = defaultdict(list)
    for line in (FOLDER / name).read_text().splitlines():
        key, is_set, value = line.partition("=")
        if is_set and not line.startswith("#"):
            found[key].append(value)
    return dict(found)


def environment(name: str) -> dict[str, str]:
    """What it sets itself, besides the files that it names."""
    words = [word for value in settings(name).get("Environment", []) for word in value.split()]
    return dict(word.split("=", 1) for word in words)


def command(name: str, program: Path) -> str:
    """What it runs, for a shell, with another program in the place of `ray`. A variable is one word, as in systemd."""
    [words] = [value.split() for value in settings(name)["ExecStart"]]
    return " ".join(f'"{word}"' for word in (str(program), *words[1:]))


def node_env() -> dict[str, str]:
    """Content of clusters/node.env."""
    lines = (FOLDER / "node.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
