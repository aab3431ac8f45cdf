"""Libraries that record what they are told, with the signatures of trackio 0.43, wandb 0.31 and mlflow 3.17."""

from enum import Enum
from types import ModuleType, SimpleNamespace


class FakeTrackio(ModuleType):
    class AlertLevel(Enum):
        INFO, WARN, ERROR = "info", "warn", "error"

    def __init__(self):
        super().__init__("trackio")
        self.runs = []

    def init(
        self, project: str, name=None, group=None, space_id=None, server_url=None, dataset_id=None, bucket_id=None,
        config=None, resume="never", settings=None, private=None, embed=True, auto_log_gpu=None, gpu_log_interval=10.0,
        auto_log_cpu=None, cpu_log_interval=10.0, webhook_url=None, webhook_min_level=None,
    ):  # fmt: skip
        is_old = resume == "allow" and any(run.name == name for run in self.runs)
        run = next(run for run in self.runs if run.name == name) if is_old else FakeTrackioRun(project, name, config)
        self.runs += [] if is_old else [run]
        assert auto_log_gpu is False
        return run


class FakeTrackioRun:
    def __init__(self, project, name, config):
        self.name, self.facts = name, (project, name.rpartition("-")[0], config["tags"], config["seed"])
        self.rows, self.marks, self.ends = [], {}, 0

    def log(self, metrics: dict, step: int | None = None):
        self.rows.append((step, metrics))

    def alert(self, title, text=None, level=FakeTrackio.AlertLevel.WARN, step=None, webhook_url=None):
        assert level is FakeTrackio.AlertLevel.INFO
        self.marks[title] = step

    def finish(self):
        self.ends += 1


class FakeWandb(ModuleType):
    def __init__(self, mode="online", key="k"):
        super().__init__("wandb")
        self.runs, self.mode, self.key = [], mode, key

    def setup(self, settings=None):
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode))

    def login(
        self, key=None, host=None, force=None, timeout=None, verify=False, referrer=None, prompt=True, relogin=None
    ):
        if self.key == "unreachable":
            raise ConnectionError("no network")
        return self.key is not None

    class Settings(SimpleNamespace):
        pass

    def init(
        self, entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,
        config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None, job_type=None, mode=None,
        force=None, reinit=None, resume=None, resume_from=None, fork_from=None, save_code=None, tensorboard=None,
        sync_tensorboard=None, monitor_gym=None, settings=None, anonymous=None,
    ):  # fmt: skip
        assert (resume, settings.console) == ("allow", "off")
        run = next((run for run in self.runs if run.id == id), None) or FakeWandbRun(project, id, name, tags, config)
        self.runs += [] if run in self.runs else [run]
        return run


class FakeWandbRun:
    def __init__(self, project, id, name, tags, config):
        self.id, self.facts = id, (project, name, tags, config["seed"])
        self.rows, self.summary, self.ends = [], {}, 0

    def log(self, data: dict, step: int | None = None, commit: bool | None = None):
        self.rows.append((step, data))

    def finish(self, exit_code: int | None = None):
        self.ends += 1

    marks = property(lambda self: self.summary)


class FakeMlflow(ModuleType):
    def __init__(self):
        super().__init__("mlflow")
        self.runs, self.experiments = [], []
        self.MlflowClient = lambda: self
        self.entities = ModuleType("mlflow.entities")
        self.entities.Param, self.entities.Metric = FakeParam, FakeMetric

    def get_experiment_by_name(self, name: str):
        return SimpleNamespace(experiment_id=name) if name in self.experiments else None

    def create_experiment(self, name: str, artifact_location=None, tags=None):
        self.experiments.append(name)
        return name

    def create_run(self, experiment_id: str, start_time=None, tags=None, run_name=None):
        marks = {key: value for key, value in tags.items() if "/" in key}
        run = SimpleNamespace(project=experiment_id, name=run_name, rows=[], marks=marks, ends=0, params={}, tags=tags)
        run.info = SimpleNamespace(run_id=f"id{len(self.runs)}")
        self.runs.append(run)
        return run

    def log_batch(self, run_id: str, metrics=(), params=(), tags=(), synchronous=None):
        assert len(params) <= 100
        run = self.runs[int(run_id[2:])]
        run.params |= {each.key: each.value for each in params}
        assert all(len(each.value) <= 500 for each in params)
        run.facts = run.project, run.name, [tag for tag in run.tags if "." not in tag], int(run.params["seed"])
        if metrics:
            run.rows.append((metrics[0].step, {each.key: each.value for each in metrics}))

    def set_tag(self, run_id: str, key: str, value, synchronous=None):
        self.runs[int(run_id[2:])].marks[key] = int(value)

    def set_terminated(self, run_id: str, status=None, end_time=None):
        self.runs[int(run_id[2:])].ends += 1

    def update_run(self, run_id: str, status=None, name=None):
        assert status == "RUNNING"


class FakeParam:
    def __init__(self, key: str, value: str):
        self.key, self.value = key, value


class FakeMetric:
    def __init__(self, key: str, value: float, timestamp: int, step: int, model_id=None, dataset_name=None):
        self.key, self.value, self.step = key, value, step


LIBRARIES = {"trackio": FakeTrackio, "wandb": FakeWandb, "mlflow": FakeMlflow}
