"""Settings of synthetic data: what cannot be is named before anybody is asked."""

# ruff: noqa: F811  # fixtures are imported, and are arguments

import pytest
import yaml

from tests.unit.model_server import ModelServer
from tests.unit.synthesis_runs import ROOT, _pauses, inputs, tokenizer, tree  # noqa: F401  fixtures, some of them
from trinity.cli import main
from trinity.config import SynthesisConfig
from trinity.synthesis.styles import templates_of


def test_the_example_in_the_documents_is_whole():
    """All but the tokenizer of a run that the reader has."""
    config = SynthesisConfig.load(ROOT / "docs" / "synthesize.yaml")
    assert list(templates_of(config)) == ["rephrase", "qa", "plain"]
    assert SynthesisConfig.model_validate(config.model_dump()) == config


def test_a_dry_run_shows_prompts_and_asks_nobody(inputs, tokenizer, tmp_path, capsys):
    file = tmp_path / "synthesize.yaml"
    file.write_text(yaml.safe_dump(tree(inputs, tokenizer, "http://127.0.0.1:9", tmp_path / "out")))
    assert main(["synthesize", str(file), "--dry-run", "--styles", "[backwards, rephrase]"]) == 0
    said = capsys.readouterr().out
    assert "=== backwards:" in said
    assert "Rewrite the following text" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"styles": ["poem"]}, "styles has 'poem'; there are rephrase, qa, table"),
        ({"styles": ["qa"]}, "templates has 'backwards', which styles does not name"),
        ({"styles": []}, "styles: should name one style or more"),
        ({"styles_per_passage": 2}, "styles_per_passage is 2; there are 1 styles"),
        ({"output": {"rows": "messages"}}, "style 'backwards' has no turns of a chat"),
        ({"templates": {"backwards": {"prompt": "no place"}}}, "the prompt has no {text}"),
        ({"templates": {"backwards": {"prompt": "{text} {tone}"}}}, "placeholder {tone} is not known, only text"),
        ({"templates": {"backwards": {"prompt": "{text.__class__}"}}}, "{text.__class__} is no placeholder"),
        ({"templates": {"backwards": {"prompt": "{text!r}"}}}, "is no placeholder; give a plain name"),
        ({"templates": {"backwards": {"prompt": "{text} {"}}}, "templates.backwards: "),
        ({"templates": {"backwards": {"prompt": "{text}", "values": {"tone": ["dry"]}}}}, "values has tone, which no"),
        ({"templates": {"backwards": {"prompt": "{text} {a}", "values": {"a": []}}}}, "values has nothing for a"),
        ({"templates": {"backwards": {"prompt": "{text}", "promptt": "x"}}}, "templates.backwards.promptt: Extra inputs"),
        ({"templates": {"backwards": {"prompt": "{text}", "length_ratio": [2, 1]}}}, "length_ratio [2.0, 1.0]"),
        ({"server": {"url": None}}, "give either url, a server's address, or checkpoint"),
        ({"server": {"url": "127.0.0.1:8000"}}, "server.url: should begin with http://"),
        (
            {"server": {"url": None, "checkpoint": "x"}, "workers": 2, "cluster": {"address": "auto"}},
            "a checkpoint is served on this machine's loopback only",
        ),
        ({"server": {"urll": "x"}}, "unknown setting 'server.urll'; did you mean 'server.url'?"),
        ({"input": {"tokenizer": None}}, "input.tokenizer must say by which tokens"),
        ({"input": {"tokenizer": "/nowhere"}}, "tokenizer /nowhere does not exist"),
        ({"input": {"paths": ["/nowhere/*.txt"]}}, "no text file matches '/nowhere/*.txt'"),
        ({"input": {"min_chunk_tokens": 99}}, "min_chunk_tokens 99 is more than chunk_tokens 20"),
        ({"checks": {"benchmarks": ["/nowhere"]}}, "no text file matches '/nowhere'"),
        ({"checks": {"refusals": [" "]}}, "a phrase is empty"),
        ({"checks": {"max_copied": 1.5}}, "checks.max_copied: Input should be less than or equal to 1"),
        ({"server": {"model": "other"}}, "model 'other' is not served at"),
        ({"input": {"chunk_tokens": 5000}}, "backwards takes 4,096: lower input.chunk_tokens"),
        ({"server": {"api_key_file": "/nowhere"}}, "key file /nowhere does not exist"),
        ({"input": {"text_field": "body"}}, "a.jsonl has no text in 'body', only text"),
        ({"server": {"url": "http://127.0.0.1:9"}}, "no server at http://127.0.0.1:9"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_named_before_anybody_is_asked(inputs, tokenizer, tmp_path, capsys, more, says):
    file = tmp_path / "synthesize.yaml"
    with ModelServer() as server:
        file.write_text(yaml.safe_dump(tree(inputs, tokenizer, server.url, tmp_path / "out", **more)))
        assert main(["synthesize", str(file)]) == 2
    assert says in capsys.readouterr().err
    assert not server.asked
