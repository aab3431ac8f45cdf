"""Memory of the KV cache: a table over the published shapes, properties of any plan, control groups, and who refuses when."""

import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import fitting
from trinity.config import Config, EngineConfig, merge, parse_flags, preset
from trinity.engine.kv_layout import BlockSizes, plan_layout
from trinity.engine.memory import CPU_BYTES, LEAST_TOKENS, Memory, plan_memory
from trinity.errors import ConfigError
from trinity.models.registry import weight_bytes
from trinity.utils.hugepages import lazy_zeros
from trinity.utils.machine import available_bytes

GIB = 1 << 30
# Bytes of one sequence of the whole length, from the papers' shapes: full layers keep all of it, sliding ones their window.
ONE = {"nano": 1.83, "mini": 2.09, "large": 15.7}  # GiB; facts: 2 (k, v) x kv heads x 128 x 2 bytes a token and layer


def plan(name, memory, **wanted):
    config = preset(name)
    found = plan_memory(config, EngineConfig(**wanted), config.itemsize, memory)
    layout = plan_layout(config, found.fixed(EngineConfig(**wanted)), config.itemsize)
    assert layout.total_bytes <= found.kv_cache_bytes
    assert layout.max_model_len == found.max_model_len
    return found


def cpu(free_gib, name=None, **known):
    weights = sum(weight_bytes(preset(name))) if name else 0
    return Memory(int(free_gib * GIB), int(free_gib * GIB), weights=weights, **known)


def gpu(free_gib, total_gib, **known):
    return Memory(int(free_gib * GIB), int(total_gib * GIB), is_gpu=True, **known)


@pytest.mark.parametrize("name", ONE)
def test_one_sequence_of_each_published_shape_is_as_long_in_bytes_as_counted_by_hand(name):
    config = preset(name)
    one = BlockSizes.of(config, EngineConfig(), 2).bytes_per_seq(config.max_position_embeddings)
    assert one / GIB == pytest.approx(ONE[name], rel=0.02)


@pytest.mark.parametrize(("name", "itemsize", "gain"), [("nano", 2, 1.939), ("large", 2, 1.939), ("nano", 4, 3.879)])
def test_8_bits_hold_as_many_tokens_more_as_they_are_smaller(name, itemsize, gain):
    """Heads of 128 numbers: 128 bytes and a scale of 4, of 256 in bfloat16 and of 512 in float32."""
    config, memory = preset(name), 1 << 32
    sizes = [BlockSizes.of(config, EngineConfig(kv_cache_dtype=dtype), itemsize) for dtype in ("auto", "int8")]
    tokens = [each.longest(memory, 1 << 40) for each in sizes]
    assert sizes[0].bytes_per_seq(4096) / sizes[1].bytes_per_seq(4096) == pytest.approx(gain, rel=1e-3)
    windows = [each.bytes_per_seq(1 << 20) - each.bytes_per_seq(1 << 19) for each in sizes]
    assert windows[0] / windows[1] == pytest.approx(gain, rel=1e-3)
    assert tokens[1] / tokens[0] > gain  # windows are smaller, too, and leave more for what grows


@pytest.mark.parametrize(
    ("name", "free_gib", "wanted", "tokens", "cache_gib"),
    [
        ("tiny", 2, {}, 1024, 0.0801),  # what 64 whole sequences and 64 kept ones take, however much there is
        ("tiny", 1000, {}, 1024, 0.0801),
        ("nano", 19, {}, 131072, (19 - 11.4) / 2),
        ("nano", 64, {}, 131072, 4),  # CPU_BYTES
        ("nano", 64, {"memory_fraction": 0.8}, 131072, (64 - 11.4) * 0.8),  # asked for: no bound
        ("nano", 19, {"max_model_len": 1024, "prefix_cache": False}, 1024, 3.5),  # 64 of them
        ("nano", 13, {"max_model_len": 65536}, 65536, None),  # half of what is left is too little; all of it is not
        ("mini", 64, {}, 131072, 4),
        ("large", 1000, {}, 262144, 15.7),  # one whole sequence, beyond CPU_BYTES
        ("large", 1000, {"max_num_seqs": 1, "max_num_kept": 0, "max_model_len": 4096}, 4096, 0.938),
    ],
)
def test_choices_on_a_cpu(name, free_gib, wanted, tokens, cache_gib):
    found = plan(name, cpu(free_gib, name), **wanted)
    assert found.max_model_len == tokens
    if cache_gib:
        assert found.kv_cache_bytes / GIB == pytest.approx(cache_gib, rel=0.02)


def test_a_whole_context_that_does_not_fit_is_lowered_and_said_with_what_raises_it():
    memory = cpu(13, "nano")
    found = plan("nano", memory)
    assert LEAST_TOKENS < found.max_model_len < 131072
    assert f"up to {found.max_model_len:,} tokens (the model's 131,072 do not fit)" in found.line
    assert "engine.memory_fraction (now 0.5 of" in found.line
    more = plan("nano", memory, memory_fraction=0.9)
    assert more.max_model_len > found.max_model_len


@pytest.mark.parametrize(
    ("name", "memory", "wanted", "said"),
    [
        ("nano", cpu(8, "nano"), {}, r"weights take 11\.4 GiB of memory, 8 GiB is free"),
        ("large", cpu(64, "large"), {}, r"weights take 743 GiB of memory, 64 GiB is free"),
        ("nano", cpu(13, "nano"), {"max_model_len": 131072}, r"131072 tokens needs 1\.83 GiB .*11\.4 GiB there are 1\.6 GiB"),
        ("nano", cpu(19), {"max_model_len": 200_000}, r"200000 > 131072"),
        ("nano", cpu(19), {"max_model_len": 4096, "kv_cache_bytes": 1 << 20}, r"4096 tokens needs \d+ bytes .* is 1048576"),
        ("nano", cpu(13, "nano"), {"kv_cache_bytes": 4 * GIB}, r"is 4,294,967,296; .* there are 1,7\d\d,\d{3},\d{3}"),
        ("nano", cpu(16, num_engines=4), {"kv_cache_bytes": 8 * GIB}, r"for each of 4 engines"),
        ("nano", gpu(9, 80), {"max_model_len": 131072}, r"needs 1\.83 GiB .* raise engine\.memory_fraction"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_with_both_numbers(name, memory, wanted, said):
    with pytest.raises(ConfigError, match=said) as caught:
        plan(name, memory, **wanted)
    assert "engine." in str(caught.value) or "memory" in str(caught.value)


def test_the_length_that_a_refusal_names_is_taken():
    memory = cpu(13, "nano")
    with pytest.raises(ConfigError, match=r"to at most (\d+)") as caught:
        plan("nano", memory, max_model_len=131072)
    fits = int(str(caught.value).split("to at most ")[1].split(",")[0])
    assert plan("nano", memory, max_model_len=fits).max_model_len == fits


def test_a_gpu_is_filled_to_its_fraction_and_shared():
    found = plan("nano", gpu(67, 80), max_num_seqs=1000)  # weights of 12 GiB are there already
    assert found.kv_cache_bytes / GIB == pytest.approx(0.9 * 80 - 13, rel=0.01)
    assert plan("nano", gpu(67, 80, num_engines=2), max_num_seqs=1000).kv_cache_bytes == found.kv_cache_bytes // 2


@given(
    free=st.integers(0, 1 << 38),
    weights=st.integers(0, 1 << 38),
    others=st.integers(0, 1 << 36),
    num_engines=st.integers(1, 5),
    length=st.none() | st.integers(2, 131072),
    fraction=st.none() | st.floats(0.01, 1),
)
@settings(deadline=None)
def test_all_engines_and_the_weights_fit_together_or_it_is_refused(
    free, weights, others, num_engines, length, fraction
):
    memory = Memory(free, free, weights=weights, others=others, num_engines=num_engines)
    wanted = EngineConfig(max_model_len=length, memory_fraction=fraction)
    try:
        found = plan_memory(preset("nano"), wanted, 2, memory)
    except ConfigError:
        return
    assert weights + num_engines * found.kv_cache_bytes <= free
    assert found.max_model_len == length or found.max_model_len >= LEAST_TOKENS
    assert plan_layout(preset("nano"), found.fixed(wanted), 2).max_model_len == found.max_model_len


def test_a_server_on_one_machine_fixes_the_numbers_of_all_its_engines(monkeypatch, capsys):
    seen = {}

    def memory_of(device, **known):
        return Memory(19 * GIB, 19 * GIB, **seen.setdefault("known", known))

    monkeypatch.setattr(fitting, "memory_of", memory_of)
    config = Config.from_tree({"model": "nano", "placement": {"num_shards": 2}, "engine": {"replicas": 2}})
    found = fitting.fitted(config)
    backbone, routed = weight_bytes(config.model)
    assert seen["known"]["weights"] == routed + 2 * backbone
    assert found.engine.kv_cache_bytes * 2 + seen["known"]["weights"] < 19 * GIB
    assert found.engine.max_model_len
    assert "for each of 2 engines" in capsys.readouterr().err


@pytest.mark.parametrize("elsewhere", [{"cluster": {"address": "auto"}}, {"engine": {"num_gpus": 1}}])
def test_elsewhere_engines_choose_themselves_but_a_contradiction_is_refused_here(elsewhere, monkeypatch):
    monkeypatch.setattr(fitting, "memory_of", None)  # not asked
    config = Config.from_tree({"model": "large", **elsewhere})
    assert fitting.fitted(config) is config
    contradiction = config.replace(engine={"max_model_len": 100_000, "kv_cache_bytes": GIB})
    with pytest.raises(ConfigError, match="100000 tokens needs"):
        fitting.fitted(contradiction)


def test_replicas_workers_and_training_count(monkeypatch):
    seen = []
    monkeypatch.setattr(fitting, "memory_of", lambda device, **known: seen.append(known) or Memory(1 << 50, 1 << 50))
    backbone, routed = weight_bytes(preset("mini"))
    fitting.fitted(Config.from_tree({"model": "mini", "placement": {"num_shards": 4, "redundancy": 1}}))
    training = {"model": "mini", "serve": {"weights": "live"}, "train": {"num_workers": 1}}
    fitting.fitted(Config.from_tree(training))
    assert [each["weights"] for each in seen] == [2 * routed + backbone, routed + 2 * backbone]
    assert seen[1]["others"] > 11 * routed
    seen.clear()
    for dtype in ("int8", "[bfloat16, int8]"):
        config = Config.from_tree(
            {"model": "mini", **merge(training, parse_flags(["--placement.expert_dtype", dtype]))}
        )
        fitting.fitted(config.replace(serve={"weights": "checkpoint"}))
        fitting.fitted(config)
    served, both, mixed, half = ((each["weights"] - backbone) / routed for each in seen)
    assert 0.5 < served < 0.51  # a byte of two, and scales
    assert mixed == pytest.approx((1 + served) / 2)
    backbones = backbone / routed  # a worker has one, too
    assert (both, half) == pytest.approx((1 + served + backbones, 1 + served / 2 + backbones))


def groups(root, lines, files, available=8 * GIB):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {available >> 10} kB\n")
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return available_bytes(root)


V2 = {"memory.max": f"{4 * GIB}", "memory.current": f"{3 * GIB}", "memory.stat": f"anon 1\ninactive_file {GIB}\n"}
V1 = {
    "memory.limit_in_bytes": f"{2 * GIB}",
    "memory.usage_in_bytes": f"{GIB}",
    "memory.stat": "total_inactive_file 7\n",
}


@pytest.mark.parametrize(
    ("lines", "files", "left"),
    [
        ([], {}, 8 * GIB),
        (["0::/a/b"], {f"a/{k}": v for k, v in V2.items()}, 2 * GIB),  # of the parent; cached files are given up
        (["0::/"], V2, 2 * GIB),  # a container sees its own group as the root
        (["0::/a"], {f"a/{k}": v for k, v in {**V2, "memory.max": "max\n"}.items()}, 8 * GIB),
        (["4:memory:/a", "0::/"], {f"memory/a/{k}": v for k, v in V1.items()}, GIB + 7),
        (["4:cpu,memory:/of/the/host"], {f"memory/{k}": v for k, v in V1.items()}, GIB + 7),
        (["0::/a"], {f"a/{k}": v for k, v in {**V2, "memory.current": f"{6 * GIB}"}.items()}, 0),
    ],
)
def test_available_memory_is_the_machines_and_the_groups(tmp_path, lines, files, left):
    assert groups(tmp_path, lines, files) == left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lazy_zeros_are_zeros_that_can_be_written(dtype):
    made = lazy_zeros((3, 5, 2), dtype)
    assert made.dtype == dtype
    assert made.shape == (3, 5, 2)
    assert not made.any()
    made[1] = 1
    assert made.sum() == 10
    assert lazy_zeros((0, 4), dtype).shape == (0, 4)


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs anonymous pages")
def test_lazy_zeros_take_no_memory_before_they_are_written():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE

    before = resident()
    made = lazy_zeros((512 << 20,), torch.uint8)
    assert resident() - before < 64 << 20
    made[: 128 << 20] = 1
    assert resident() - before >= 128 << 20


def test_the_bound_on_a_cpu_is_a_few_gib():
    assert 1 * GIB <= CPU_BYTES <= 8 * GIB
