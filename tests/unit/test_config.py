"""Settings: every file parses, every mistake is named with its remedy, nothing is silently ignored."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from trinity.config import Config, merged, parse_flags, preset, preset_names
from trinity.errors import ConfigError
from trinity.stages import read_stages

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["tiny", "nano", "mini", "large"])
def test_presets_parse_and_round_trip(name):
    config = Config.from_tree({"model": name})
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert config.model == preset(name)
    kinds = config.model.layer_types
    assert [kind == "full_attention" for kind in kinds] == [(i + 1) % 4 == 0 for i in range(len(kinds))]


@pytest.mark.parametrize("path", [p for folder in ("clusters", "docs") for p in (ROOT / folder).glob("**/train*.yaml")])
def test_every_training_file_in_the_repository_parses(path, monkeypatch):
    tree = merged(path)
    if "stages" in tree:
        assert [stage.name for stage in read_stages(tree)]
    elif "model" in tree:
        Config.from_tree(tree)
    else:  # that of what it begins from
        assert Config.from_tree({**tree, "model": "tiny"}).train.init_from


def test_files_win_over_presets_and_flags_over_files(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {preset: tiny, num_experts: 16}\ntrain: {steps: 7, seq_len: 64}\n")
    config = Config.load(file, ["--train.steps", "9", "--model.route-scale=3", "--train.resume"])
    assert (config.model.num_experts, config.model.route_scale, config.model.hidden_size) == (16, 3.0, 128)
    assert Config.load(file, ["--data.train", "one.txt"]).data.train == ("one.txt",)
    assert (config.train.steps, config.train.seq_len, config.train.resume) == (9, 64, True)
    assert config.optim.muon_lr == preset_optim("tiny")["muon_lr"]


def preset_optim(name):
    return Config.from_tree({"model": name}).optim.model_dump()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.stepz", "5"], "unknown setting 'train.stepz'; did you mean 'train.steps'?"),
        (["--steps", "5"], "unknown setting 'steps'; did you mean 'train.steps'?"),
        (["--trian.steps", "5"], "did you mean 'train'?"),
        (["--data.train", "[a"], "'[a' is not a value"),
        (["--optim.adamw_betas", "[1.0, 1.0]"], "optim.adamw_betas"),
        (["--model.num_hidden_layers", "4x"], "model.num_hidden_layers"),
        (["--model.global_attn_every_n_layers", "0"], "global_attn_every_n_layers"),
        (["--train.steps"], "train.steps needs a value"),
        (["--train", "5"], "train is a section of settings"),
        (["--serve.http_port", "7000", "--serve.grpc_port", "7000"], "http_port and grpc_port are both 7000"),
        (["--train.steps", "many"], "train.steps: Input should be a valid integer"),
        (["--train.min_workers", "2"], "min_workers 2 is more than num_workers 1"),
        (["--train.steps", "0"], "greater than or equal to 1 (got 0)"),
        (["steps=5"], "'steps=5' is not a flag"),
        (
            ["--model", "huge"],
            "unknown preset 'huge'; there are bench, glm-4.5, glm-4.5-air, large, mini, mini-slice, nano,",
        ),
        (["--model.num_experts_per_tok", "9"], "num_experts_per_tok 9 > num_experts 8"),
        (["--model.layer_types", "[full_attention]"], "layer_types has 1 entries for 4 layers"),
        (["--train.global_batch_size", "10"], "not a multiple of micro_batch_size x num_workers = 8"),
        (["--serve.host", "0.0.0.0"], "set serve.allow_remote true and serve.api_key"),
        (["--serve.tls_cert", "x"], "tls_cert and tls_key go together"),
        (["--placement.pool", "Über"], "placement.pool"),
        (
            ["--serve.weights", "pinned:x"],
            "serve.weights: choose checkpoint, live, pinned or pinned:STEP (got 'pinned:x')",
        ),
        (["--serve.weights", "newest"], "choose checkpoint, live, pinned or pinned:STEP"),
        (["--engine.kv_policy", "keep"], "it is called 'engine.kv_max_age' now"),
        (["--engine.kv_max_age", "keep"], "engine.kv_max_age: give a number of steps, 0 and more, or `unbounded`"),
        (["--engine.kv_max_age", "-1"], "engine.kv_max_age: give a number of steps"),
        (["--engine.max_versions", "0"], "engine.max_versions"),
        (["--engine.role", "7"], "engine.role: give both, prefill or decode, or a list of these"),
        (["--engine.replicas", "3", "--engine.max_replicas", "2"], "max_replicas 2 is below replicas 3"),
    ],
)
def test_mistakes_are_named(flags, message):
    with pytest.raises(ConfigError) as caught:
        Config.load(None, flags, model="tiny")
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("train: {steps: 1, steps: 2}", "'steps' is there twice"),
        ("- 1", "found list"),
        ("", "found NoneType"),
        ("train: {steps: " + "9" * 5000 + "}", "not valid YAML"),
        ("[" * 20_000, "not valid YAML"),
        ("a: " + "{b: " * 5_000, "not valid YAML"),
        ("train: &a {steps: 1}\nmodel: *a", "aliases"),
        ("x: " + "1" * (1 << 20), "may have 1,048,576"),
        ("train: {" + ",".join(f"n{i}: 1" for i in range(20_000)) + ", n19999: 2}", "'n19999' is there twice"),
        ("optim: {muon_lr: .nan}", "optim.muon_lr"),
        ("optim: {muon_lr: .inf}", "optim.muon_lr"),
    ],
)
def test_files_that_are_no_settings_are_refused(tmp_path, text, message):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Config.load(file)


def test_yaml_cannot_make_objects(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("model: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        Config.load(file)


def test_the_tree_is_frozen_and_the_key_is_not_shown():
    config = Config.load(None, ["--serve.api_key", "very-secret"], model="tiny")
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3
    assert "very-secret" not in repr(config)


def test_the_key_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("TRINITY_API_KEY", "from-env")
    assert Config.from_tree({"model": "tiny"}).serve.api_key == "from-env"
    assert Config.from_tree({"model": "tiny", "serve": {"api_key": "own"}}).serve.api_key == "own"


def test_empty_sections_and_a_preset_refined_by_flags(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("model: tiny\ntrain:\nserve:\n")
    assert Config.load(file, ["--model", "tiny", "--model.num_experts", "16"]).model.num_experts == 16


def test_a_time_is_a_text_and_no_number_of_base_60(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("model: tiny\nserve: {served_model_name: 12:30:45, http_port: 8001}\n")
    assert Config.load(file).serve.served_model_name == "12:30:45"
    assert parse_flags(["--a.b", "190:20:30", "--a.c", "1.5", "--a.d", "0x10"])["a"] == {
        "b": "190:20:30",
        "c": 1.5,
        "d": 16,
    }


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    """Whoever owns everything is told of a loop of links instead."""
    file = tmp_path / "x.yaml"
    file.symlink_to(file)
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        Config.load(file)


def test_flags_are_yaml_scalars():
    assert parse_flags(["--a.b", "1e-3", "--a.c", "null", "--d", "[1, 2]"]) == {
        "a": {"b": "1e-3", "c": None},
        "d": [1, 2],
    }
    assert {"bench", "large", "mini", "nano", "tiny"} <= set(preset_names())


@pytest.mark.parametrize(
    ("weights", "is_of_run", "step"),
    [("checkpoint", False, None), ("live", True, None), ("pinned", True, None), ("pinned:300", True, 300)],
)
def test_which_weights_are_served(weights, is_of_run, step):
    serve = Config.load(None, ["--serve.weights", weights], model="tiny").serve
    assert (serve.is_of_run, serve.pinned_step) == (is_of_run, step)


def test_a_tilde_in_a_path_is_the_users_home(tmp_path, monkeypatch):
    """In a file no shell says so; nor in what follows the = of a flag."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "run.yaml").write_text(
        "model: tiny\ntrain: {out_dir: ~/runs, init_from: ~/weights, resume_from: ~/runs/step-000001}\n"
        "data: {tokenizer: ~/tokens.json}\nserve: {tls_cert: ~/a.pem, tls_key: ~/b.pem}\n"
    )
    config = Config.load("run.yaml", ["--placement.state_dir=~/state", "--placement.memory_dir=~/memory"])
    found = [config.train.out_dir, config.train.init_from, config.train.resume_from, config.data.tokenizer]
    found += [config.serve.tls_cert, config.serve.tls_key, config.placement.state_dir, config.placement.memory_dir]
    assert all(path.startswith(str(tmp_path / "home")) for path in found), found
    assert Config.load(None, ["--train.resume_from=7"], model="tiny").train.resume_from == 7
