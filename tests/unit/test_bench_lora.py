"""`trinity bench lora` runs: adapters and all weights from one checkpoint, with the memory that both hold."""

import argparse

from trinity.bench import lora


def test_quick(tmp_path):
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out")
    lora.flags(parser)
    report = lora.measure(parser.parse_args(["--quick", "--threads", "1", "--out", str(tmp_path)]))
    [table] = report.tables
    (whole, *_, whole_bytes, _), (adapters, *_, adapter_bytes, _) = table.rows
    assert (whole, adapters) == (lora.WHOLE, lora.LORA)
    assert whole_bytes == 28, "fp32: two versions of a weight and its two moments, and a gradient"
    assert 4 < adapter_bytes < 0.75 * whole_bytes
