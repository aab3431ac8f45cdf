"""A page: one HTML response made of files of this folder, with nothing from elsewhere.

Decisions: its policy names its own style and script by hash and lets it talk to this server only; the script may not turn
text into markup at all, because what models and shards say is text of others. Scripts of several files are one module.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Page:
    """The body and the headers of the response."""

    html: str
    headers: dict[str, str]


def assembled(frame: str, styles: Sequence[str], scripts: Sequence[str]) -> Page:
    """The page whose `frame` has places for its style and its script; all are names of files."""
    style, script = _joined(styles), _joined(scripts)
    html = _joined([frame]).replace("/*style*/", style).replace("/*script*/", script)
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in _policy(style, script).items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }
    return Page(html, headers)


def _joined(names: Sequence[str]) -> str:
    return "\n".join((FOLDER / name).read_text("utf-8") for name in names)


def _policy(style: str, script: str) -> dict[str, str]:
    return {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
