"""What `trinity serve` says of a checkpoint before anything is started."""

import pytest

from serving.launch import try_template
from trinity.text.chat_template import CHATML


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, ""),
        (CHATML, ""),
        (
            "{% for",
            "will answer 400 to most or all: the chat template refused the messages: unexpected 'end of template'",
        ),
        ("{{ 'a' * 10**10 }}", "will answer 400"),
        ("{{ raise_exception('speak first') }}", "speak first"),
    ],
)
def test_a_template_that_refuses_chats_is_said_at_the_start(tmp_path, capsys, template, says):
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    try_template(str(tmp_path))
    said = capsys.readouterr().err
    assert says in said if says else not said
