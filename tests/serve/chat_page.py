"""The page at / to try a model, as tests use it: each call waits for what it asks of the browser."""

import json

from tests.waiting import WAIT_S

STORY = "the quick brown fox\n\ndef function(argument):\n    caffè 😀\u200b over the lazy dog"
ENDED = "document.querySelector('.turn:last-child .ending')?.textContent"


def show(browser, url, **how):
    browser.open("about:blank")
    browser.forget()
    browser.open(f"{url}/", **how)
    browser.until("document.getElementById('main')?.checkVisibility()")


def say(page, text="Hello"):
    """Send a message, and wait for the end of its answer."""
    page.value("document.getElementById('message').focus()")
    page.press(text, "Enter")
    return end(page)


def end(page):
    page.until(f"!!{ENDED} && document.getElementById('send').checkVisibility()", within_s=WAIT_S)
    return page.value(ENDED)


def tokens(page):
    """The text of each token that is shown."""
    return page.value("[...document.querySelectorAll('.turn:last-child .t')].map((one) => one.textContent)")


def set_field(page, name, value):
    page.value(f"document.querySelector('[name={name}]').value = {json.dumps(value)}")
