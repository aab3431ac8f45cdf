"""`trinity bench serve --speculation`: both arms say the same, and drafts are counted against what was said."""

from tests.unit.test_engine_llm import folder  # noqa: F401  a fixture
from trinity.bench import speculation
from trinity.bench.report import Report
from trinity.bench.speculation import COLD, LOADS, OFF, ON


def test_both_arms_have_the_same_requests_and_no_more_passes(folder):  # noqa: F811
    model, report = speculation.Model(str(folder), 14), Report("any")
    found = model.rounds("records", 2, 1)
    [on], [off] = found[ON], found[OFF]
    assert on.answers == off.answers
    assert len(on.answers) == len(LOADS["records"])
    assert off.num_passes - on.num_accepted <= on.num_passes <= off.num_passes
    assert on.num_tokens == 14 * len(on.answers)
    assert off.num_drafted == 0
    assert speculation._row("records", 2, ON, [on])[3] == on.num_passes
    speculation._compare(report, "records", 2, found)
    assert next(what for what, *_ in report.targets) == "records, 2 at once: tokens/s with / without"
    assert {len(requests) for requests in model._asked(COLD, 1)} == {1}


def test_drafts_of_given_text_are_held_against_it(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(speculation, "SOURCES", ("stat.py",))
    [(name, tokens, passes, rate)] = speculation._of_people(speculation.Model(str(folder), 8).tokenizer).rows
    assert (name, rate) == ("stat.py", tokens / passes)
    assert 1.2 < rate < 9
