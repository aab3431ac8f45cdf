"""`trinity bench grammar` runs, and its two arms are what they say."""

import argparse

from trinity.bench import grammar


def test_quick():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    grammar.flags(parser)
    report = grammar.measure(parser.parse_args(["--quick", "--steps", "5"]))
    [table], [result] = report.tables, report.results
    assert all(milliseconds > 0 for _, milliseconds in table.rows)
    assert [len(turn.milliseconds) for turn in result["bound"]] == [4]
    assert len(result["masks_ms"]) == 4 * 5
    assert {what for what, *_ in report.targets} == {
        "grammars / step of the layers measured",
        "grammars / step of all layers",
    }
