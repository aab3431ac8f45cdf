"""What both pages must be: one answer of this server, under a policy that lets nothing else in."""

import base64
import hashlib
import re

import httpx
import pytest

from serving.page import chat, dashboard
from tests.waiting import WAIT_S
from trinity.commands.train import announced

KEYS = {"api_key": "clients-key", "admin_key": "operators-key"}
PAGES = {"/": chat.PAGE, "/dashboard": dashboard.PAGE}


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_is_one_answer_with_nothing_from_elsewhere(start, path):
    async with start(**KEYS) as server, httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        answer, head = await http.get(path), await http.head(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:,|\./"|dashboard")|https?://|@import|url\(""", answer.text)
    assert not re.findall(r"\bon[a-z]+\s*=\s*[\"']|\sstyle\s*=\s*[\"']|innerHTML|eval\(", answer.text)
    assert not [key for key in KEYS.values() if key in answer.text]
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(answer.content)))


def test_a_server_that_starts_says_where_its_page_is(capsys):
    announced("http://[::1]:8000", "[::1]:9000")
    assert "browser: http://[::1]:8000/\n" in capsys.readouterr().err


@pytest.mark.parametrize("path", PAGES)
def test_the_policy_allows_the_pages_own_style_and_script_and_nothing_else(path):
    page = PAGES[path]
    rules = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    assert (rules["default-src"], rules["connect-src"]) == ("'none'", "'self'")
    assert rules["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in str(rules)
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page.html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
