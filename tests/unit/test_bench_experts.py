"""`trinity bench experts`: what it calls right and wrong, what it times, what it counts, and what it leaves behind.

Wrong backends are made from a right one by one defect each; GPU-only code runs with stand-ins for the clock.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from trinity.bench import expert_backends, expert_timing, experts
from trinity.bench.expert_backends import Shape, Skipped, Verdict, balanced, check, checked, layer_of, uneven
from trinity.bench.expert_timing import CudaClock, HostClock, Point, Rig, Survey, at_rows, survey
from trinity.bench.report import Report
from trinity.cli import main
from trinity.errors import ConfigError
from trinity.experts.reference import ReferenceBackend
from trinity.experts.torch_backend import TorchBackend

CPU = torch.device("cpu")
SMALL = Shape("small", 16, 8, 4, 4, 2, torch.float32)
RIG = Rig(CPU, HostClock(), rounds=2, budget_s=1.0)
QUICK = ["bench", "experts", "--quick", "--device", "cpu", "--out"]


def bench(out, *flags):
    """-> exit code, tables by title, the whole JSON."""
    code = main([*QUICK, str(out), *flags])
    tree = json.loads((out / "experts.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    return code, {table["title"].split(":")[0]: table for table in tree["tables"]}, tree


class Defect:
    """A right backend with one thing wrong; counts its calls."""

    name = "defect"

    def __init__(self, spoil):
        self.spoil, self.calls = spoil, 0

    def __call__(self, x_RD, assigned, weights):
        self.calls += 1
        return self.spoil(TorchBackend("grouped"), x_RD, assigned, weights)


def lost_row(right, x_RD, assigned, weights):
    mask_R1 = torch.ones(len(x_RD), 1)
    mask_R1[-1] = 0
    return right(x_RD, assigned, weights) * mask_R1


def leak(right, x_RD, assigned, weights):
    """Right values; but an expert without rows gets a tiny gradient of its gate."""
    return right(x_RD, assigned, weights) + 1e-30 * weights.gate_EFD.sum()


def explode(right, x_RD, assigned, weights):
    raise RuntimeError("CUDA error: misaligned address\nsecond line")


DEFECTS = {
    "scaled": lambda right, *case: 1.001 * right(*case),
    "not_a_number": lambda right, *case: right(*case) * math.nan,
    "lost_row": lost_row,
    "no_gradient": lambda right, x, assigned, weights: right(x.detach(), assigned, weights),
    "gate_and_up_swapped": lambda right, x, a, w: right(x, a, w._replace(gate_EFD=w.up_EFD, up_EFD=w.gate_EFD)),
    "weights_ignored": lambda right, x, a, w: right(x, a._replace(weight_A=a.weight_A * 0 + 1), w),
    "leak": leak,
    "explode": explode,
    "bf16_inside": lambda right, x, a, w: right(x.bfloat16(), a, type(w)(*(s.bfloat16() for s in w))).float(),
    "wrong_when_serving": lambda right, *case: right(*case) * (1 if torch.is_grad_enabled() else 1.01),
    "wrong_with_few_rows": lambda right, x, a, w: right(x, a, w) * (1.01 if len(a.row_A) < 18 else 1),
    "one_column": lambda right, *case: right(*case)[:, :1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("path", ["grouped", "loop", "auto"])
def test_right_backends_are_called_right(path, dtype):
    shape = Shape("small", 64, 32, 4, 4, 2, dtype)
    verdict = checked({"torch": TorchBackend(path)}, shape, 40, layer_of(shape, CPU))["torch"]
    assert verdict.state == "right", verdict
    assert 0 < verdict.error <= expert_backends.tolerance(dtype, CPU)


@pytest.mark.parametrize("name", DEFECTS)
def test_every_defect_is_called_wrong_and_not_timed(name):
    defect = Defect(DEFECTS[name])
    found = survey({"defect": defect, "sound": TorchBackend()}, SMALL, [2], 20, RIG)
    assert found.verdicts["defect"].state == "wrong"
    assert found.verdicts["defect"].detail
    assert found.verdicts["sound"].state == "right"
    assert defect.calls <= 2 * 2
    assert [backend for _, backend, _ in found.timed()] == ["sound"]
    assert len(found.faults()) == 1
    assert found.faults()[0].startswith("small: defect")


def test_one_lost_row_among_thousands_is_seen():
    """Within the tolerance of the whole tensor in bf16: the worst row gives it away."""
    shape = Shape("small", 16, 8, 4, 4, 1, torch.bfloat16)
    case = uneven(shape, 8000, layer_of(shape, CPU))
    truth = expert_backends.truth_of(case)
    middling = truth[1].norm(dim=1).median(dim=0).indices

    def lose(right, x_RD, assigned, weights):
        return right(x_RD, assigned, weights).index_fill(0, middling, 0)

    whole, worst = expert_backends._errors(lose(TorchBackend(), *case[:3]).detach(), truth[1])
    assert whole < expert_backends.tolerance(torch.bfloat16, CPU)
    assert worst > expert_backends.WORST * expert_backends.tolerance(torch.bfloat16, CPU)
    assert check(Defect(lose), case, truth).state == "wrong"


def test_a_backend_that_refuses_a_shape_is_unfit_not_wrong():
    def refuse(*_):
        raise ConfigError("multiples of 128")

    def exhaust(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    backends = {"refuses": Defect(refuse), "exhausts": Defect(exhaust), "megablocks-gmm": TorchBackend()}
    found = survey(backends, SMALL, [1], 4, RIG)
    assert found.verdicts["refuses"] == Verdict("unfit", None, "multiples of 128")
    assert found.verdicts["exhausts"] == Verdict("unfit", None, "out of memory")
    assert "bfloat16" in found.verdicts["megablocks-gmm"].detail
    assert found.faults() == []
    assert found.points == {}


@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 4), groups=st.integers(1, 5), rows=st.integers(1, 9))
def test_balanced_routing(k, groups, rows):
    """Every expert gets exactly `rows` rows and every row goes to `top_k` different experts."""
    shape = Shape("any", 4, 4, k * groups, k * groups, k, torch.float32)
    case = balanced(shape, rows, layer_of(shape, CPU))
    assert torch.bincount(case.assigned.expert_A).tolist() == [rows] * shape.experts
    assert torch.bincount(case.assigned.row_A).tolist() == [k] * len(case.x_RD)
    assert len(set(zip(*(t.tolist() for t in case.assigned[:2]), strict=True))) == rows * shape.experts


def test_uneven_routing_leaves_the_middle_expert_without_rows():
    counts = torch.bincount(uneven(SMALL, 10, layer_of(SMALL, CPU)).assigned.expert_A, minlength=4).tolist()
    assert counts[2] == 0
    assert all(1 <= count <= 20 for count in counts[:2] + counts[3:])
    assert len(set(counts)) > 2


def test_flops_are_those_that_torch_counts():
    case = balanced(SMALL, 6, layer_of(SMALL, CPU))
    with FlopCounterMode(display=False) as counter:
        y_RD = ReferenceBackend()(*case[:3])
        forward = counter.get_total_flops()
        y_RD.backward(case.dy_RD)
    assert SMALL.flops(6) == forward
    assert counter.get_total_flops() - forward == 2 * forward


def test_shapes_are_those_of_the_presets():
    shape = expert_backends.shape_of("large", torch.device("cuda"))
    assert (shape.dim, shape.ffn, shape.experts, shape.of, shape.top_k) == (3072, 3072, 32, 256, 4)
    assert shape.weight_bytes == 32 * 3 * 3072 * 3072 * 2
    assert [expert_backends.shape_of(name, torch.device("cuda")).experts for name in ("nano", "mini")] == [128, 128]
    assert (
        str(expert_backends.shape_of("tiny", CPU, 6, "bfloat16"))
        == "tiny: D 128, F 128, 6 of 8 experts, top-2, bfloat16"
    )
    assert expert_backends.shape_of("tiny", CPU, 3).top_k == 1


def test_cold_layers_exceed_any_cache_and_are_equal():
    shape = Shape("middle", 1024, 1024, 8, 8, 2, torch.float32)
    first = layer_of(shape, CPU)
    layers = expert_timing.cold_layers(shape, first)
    assert len(layers) * shape.weight_bytes >= expert_timing.COLD_BYTES
    assert len({weights.gate_EFD.data_ptr() for weights in layers}) == len(layers) == 4
    assert torch.equal(layers[-1].down_EFD, first.down_EFD)


def test_each_pass_takes_the_next_layer():
    seen = []

    def note(right, x_RD, assigned, weights):
        seen.append(weights.gate_EFD.data_ptr())
        return right(x_RD, assigned, weights)

    layers = [layer_of(SMALL, CPU, seed) for seed in range(3)]
    at_rows({"noted": Defect(note)}, SMALL, 2, layers, RIG)
    assert len(seen) == 2 + 2 + 2 * RIG.rounds
    assert seen == [layers[i % 3].gate_EFD.data_ptr() for i in range(len(seen))]


class FakeClock(HostClock):
    """Each mark is a second after the last; graphs are what `capture` makes of a function."""

    def __init__(self, capture):
        self.now, self.capture = 0.0, capture

    def mark(self):
        self.now += 1
        return self.now

    def captured(self, run):
        run()
        return self.capture(run)


def test_laps_add_up():
    clock = FakeClock(lambda run: None)
    rig = RIG._replace(clock=clock)
    found = at_rows({"torch-grouped": TorchBackend()}, SMALL, 2, [layer_of(SMALL, CPU)], rig)
    assert found == {"torch-grouped": Point(forward_s=1, both_s=2, backward_s=1)}


def test_graphs_are_timed_where_there_are_any_and_must_give_the_same():
    layers, backends = [layer_of(SMALL, CPU, seed) for seed in range(2)], {"torch-grouped": TorchBackend()}
    same = RIG._replace(clock=FakeClock(lambda run: run))
    assert at_rows(backends, SMALL, 2, layers, same)["torch-grouped"].replay_s == 1
    assert at_rows(backends, SMALL, 17, layers, same)["torch-grouped"].replay_s is None
    assert at_rows({"torch-loop": TorchBackend("loop")}, SMALL, 2, layers, same)["torch-loop"].replay_s is None
    stale = RIG._replace(clock=FakeClock(lambda run: lambda: run() + 1))
    points = at_rows(backends, SMALL, 2, layers, stale)
    assert points["torch-grouped"].unreplayed == Skipped("the captured graph computes something else", wrong=True)
    assert points["torch-grouped"].forward_s == 1
    assert "something else" in Survey(SMALL, points={2: points}).faults()[0]


def test_cuda_clock_waits_for_the_last_event(monkeypatch):
    class Event:
        recorded, waited = 0, []

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.recorded += 1
            self.at_ms = 10.0 * Event.recorded**2

        def synchronize(self):
            Event.waited.append(self.at_ms)

        def elapsed_time(self, later):
            return later.at_ms - self.at_ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    clock = CudaClock()
    assert clock.laps(clock.mark(), clock.mark(), clock.mark()) == pytest.approx([0.03, 0.05])
    assert Event.waited == [90.0]
    assert clock.captured(lambda: None) is None  # grouped_mm waits for its offsets before Hopper


def test_what_fails_only_at_a_size_is_a_note_there():
    def limited(error):
        def spoil(right, x_RD, assigned, weights):
            if len(assigned.row_A) == 4 * 30:
                raise error
            return right(x_RD, assigned, weights)

        return Defect(spoil)

    backends = {"full": limited(torch.OutOfMemoryError("no")), "broken": limited(RuntimeError("illegal address"))}
    found = survey({**backends, "sound": TorchBackend()}, SMALL, [3, 30], 5, RIG)
    assert [backend for rows, backend, _ in found.timed() if rows == 3] == ["full", "broken", "sound"]
    assert [backend for rows, backend, _ in found.timed() if rows == 30] == ["sound"]
    assert found.points[30]["full"] == Skipped("out of memory", wrong=False)
    assert found.faults() == ["small: broken with 30 rows (RuntimeError: illegal address)"]


def test_quick_leaves_tables_json_and_a_picture(tmp_path, capsys):
    code, tables, tree = bench(tmp_path)
    assert code == 0
    assert (tmp_path / "experts.png").stat().st_size > 10_000
    assert list(tables) == [
        "Backends",
        "Correctness",
        "tiny",
        "Milliseconds per layer, always 256 assignments, D = F = 64",
        "Targets",
    ]
    state = {row[0]: row[2] for row in tables["Backends"]["rows"]}
    assert {name for name, text in state.items() if text == "ready"} == {
        "torch-grouped",
        "torch-loop",
        "auto",
        "reference",
    }
    assert all("CUDA" in state[name] for name in state if name.startswith("megablocks"))
    assert {row[2] for row in tables["Correctness"]["rows"]} == {"right"}
    assert len(tables["tiny"]["rows"]) == 2 * 4
    shape = expert_backends.shape_of("tiny", CPU)
    for row, raw in zip(tables["tiny"]["rows"], tree["results"], strict=True):
        rows, name, forward_ms, both_ms, forward_tflops, backward_tflops, share, note = row
        assert (rows, name, note) == (raw["rows"], raw["backend"], "")
        assert 0 < raw["backward_s"] <= raw["both_s"]
        assert (forward_ms, both_ms) == pytest.approx((1e3 * raw["forward_s"], 1e3 * raw["both_s"]))
        assert forward_tflops * raw["forward_s"] * 1e12 == pytest.approx(shape.flops(rows))
        assert backward_tflops * raw["backward_s"] * 1e12 == pytest.approx(2 * shape.flops(rows))
        assert 0 < share < 1.5
    assert [curve["x"] for curve in tree["curves"]] == [[1, 4], [16, 64]]
    assert all(y > 0 for curve in tree["curves"] for line in curve["lines"].values() for y in line)
    assert [target[0].split(": ")[1] for target in tables["Targets"]["rows"]] == list(tree["curves"][1]["lines"])[:3]
    assert "### Targets" in capsys.readouterr().out


def test_a_wrong_backend_fails_the_command_after_the_report(tmp_path, monkeypatch, capsys):
    build, defect = expert_backends.build, Defect(DEFECTS["scaled"])
    monkeypatch.setattr(
        expert_backends, "build", lambda name, device: defect if name == "torch-loop" else build(name, device)
    )
    code, tables, tree = bench(tmp_path, "--backend", "torch-loop", "--backend", "reference", "--rows", "2")
    assert code == 2
    verdicts = {row[1]: (row[2], row[5]) for row in tables["Correctness"]["rows"] if row[0] == "tiny"}
    assert verdicts["torch-loop"][0] == "wrong"
    assert "y is off by" in verdicts["torch-loop"][1]
    assert verdicts["reference"] == ("right", "")
    assert defect.calls == 2 * 2
    assert [row[1] for row in tables["tiny"]["rows"]] == ["reference"]
    assert "torch-loop" not in {raw["backend"] for raw in tree["results"]}
    assert "wrong results, not timed: tiny: torch-loop" in capsys.readouterr().err


def test_megablocks_kernels_interpreted_where_there_is_no_gpu(tmp_path):
    """The same code that a GPU runs, from the flags to the table; asked for by name, as it is slow here."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU they are not interpreted: tests/gpu runs them")
    names = ["megablocks-sparse", "megablocks-grouped", "megablocks-gmm"]
    flags = [flag for name in names for flag in ("--backend", name)]
    code, tables, tree = bench(tmp_path, *flags, "--experts", "2", "--rows", "1", "--dtype", "bfloat16")
    assert code == 0
    assert {row[1]: row[2] for row in tables["Correctness"]["rows"]} == dict.fromkeys([*names[:2], "auto"], "right")
    assert {row[0]: row[2] for row in tables["Backends"]["rows"]}["megablocks-gmm"].startswith("path gmm needs")
    assert [raw["backend"] for raw in tree["results"]] == names[:2]


def test_sizes_that_do_not_fit_are_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(expert_backends, "free_bytes", lambda device: 300 << 20)
    flags = ["--shape", "tiny", "--shape", "mini", "--rows", "1", "100000", "--backend", "torch-grouped"]
    code, tables, tree = bench(tmp_path, *flags)
    assert code == 0
    assert [(row[0], row[2]) for row in tables["Correctness"]["rows"][:2]] == [("tiny", "right"), ("mini", "not tried")]
    assert "GiB" in tables["Correctness"]["rows"][1][5]
    small, large = tables["tiny"]["rows"]
    assert small[-1] == ""
    assert large[2] == "-"
    assert "0.3 are free" in large[-1]
    assert tree["curves"][0]["lines"]["torch-grouped"][1] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--experts", "9", "--shape", "tiny"], "a layer of tiny has 8"),
        (["--experts", "0"], "whole number from 1 on"),
        (["--rows", "4", "-1"], "'-1' is not a whole number"),
        (["--rows", "1.5"], "whole number from 1 on"),
        (["--shape", "huge"], "invalid choice"),
        (["--backend", "torch"], "invalid choice"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, capsys, flags, message):
    try:
        code = main([*QUICK, str(tmp_path), *flags])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here, so nothing is refused")
def test_cuda_without_a_device_is_refused(tmp_path, capsys):
    assert main(["bench", "experts", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_only_known_gpus_have_a_stated_bandwidth():
    stated = {
        name: expert_timing.stated_peak(f"NVIDIA {name}")
        for name in ("H200", "H100 80GB HBM3", "H100 PCIe", "GH200 480GB")
    }
    assert stated == {"H200": 4.3e12, "H100 80GB HBM3": pytest.approx(3.015e12), "H100 PCIe": None, "GH200 480GB": None}
    measured = expert_timing.bandwidth(CPU, HostClock(), 8 << 20)
    assert 1e8 < measured.bytes_per_s < 1e13
    assert not measured.stated


def test_targets_of_a_gpu_are_held_against_the_best_backend():
    shape = Shape("large", 3072, 3072, 32, 256, 4, torch.bfloat16)
    floor_s, tera = shape.weight_bytes / 4.3e12, shape.flops(1024) / 1e12
    slow = Point(2 * floor_s, 1.0, 1.0)
    points = {
        4: {
            "slow": slow,
            "graphed": Point(1.6 * floor_s, 1.0, 1.0, replay_s=1.25 * floor_s),
            "full": Skipped("no", False),
        },
        64: {"slow": slow},
        1024: {"slow": Point(1.0, 2.0, 1.0), "fast": Point(tera / 410, 1.0, 2 * tera / 390)},
        4096: {"full": Skipped("out of memory", wrong=False)},
    }
    report = Report("experts")
    experts._hold_to_targets(report, Survey(shape, points=points), floor_s)
    assert [(what, pytest.approx(value), bound, met) for what, value, bound, met in report.targets] == [
        ("forward / reading the weights, large, 4 rows per expert (graphed)", 1.25, "<= 1.5", True),
        ("forward TFLOP/s, large, 1024 rows per expert (fast)", 410, ">= 400", True),
        ("backward TFLOP/s, large, 1024 rows per expert (fast)", 390, ">= 400", False),
    ]


def test_growth_uses_as_many_experts_as_it_says():
    seen = {}

    def note(right, x_RD, assigned, weights):
        key = len(weights.gate_EFD), len(assigned.expert_A.unique()), torch.is_grad_enabled()
        seen[key] = len(assigned.expert_A)
        return right(x_RD, assigned, weights)

    shapes = [expert_backends.growing(count, 16, torch.float32) for count in (4, 8, 16)]
    found = expert_timing.growth(Defect(note), shapes, 32, RIG)
    assert seen == {(n, active, grad): 32 for n in (4, 8, 16) for active, grad in ((n, False), (4, False), (n, True))}
    assert found.counts == (4, 8, 16)
    assert {len(laps) for kind in found.laps.values() for laps in kind.values()} == {RIG.rounds}
    assert all(lap > 0 for kind in found.laps.values() for laps in kind.values() for lap in laps)


def test_rounds_are_fewer_where_they_are_slow():
    rig = RIG._replace(rounds=30, budget_s=3.0)
    assert [rig.rounds_of(seconds) for seconds in (0.0, 0.01, 0.2, 5.0)] == [30, 30, 15, 3]
    assert RIG.rounds_of(5.0) == 2
