"""`trinity bench packing` runs, on documents that are always the same."""

import argparse

from trinity.bench import packing


def test_quick():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    packing.flags(parser)
    report = packing.measure(parser.parse_args(["--quick", "--steps", "2"]))
    [table] = report.tables
    assert [row[1] for row in table.rows] == list(packing.ARMS)
    assert all(het >= 0 and loss > 0 for *_, het, loss in table.rows)
    assert len(report.targets) == 2


def test_documents_are_of_one_length_and_always_the_same():
    first, again = (list(packing.documents(2, 500)) for _ in range(2))
    assert first == again
    assert [len(each) for each in first] == [500] * 8
