"""`trinity bench reading` runs, and holds what it measures to bounds."""

import argparse

from trinity.bench import reading


def test_quick():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    reading.flags(parser)
    report = reading.measure(parser.parse_args(["--quick", "--documents", "200"]))
    speeds, orders = report.tables
    assert [row[0] for row in speeds.rows][:4] == ["stream", "rsdb", "best_fit", "chats"]
    assert all(row[1] > 0 for row in (*speeds.rows, *orders.rows))
    assert len(report.targets) == len(speeds.rows) + 2
