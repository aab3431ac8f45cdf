"""What the dashboard shows of the training run whose weights are served: from its log, short, whole, for operators alone."""

import json

import httpx
import pytest

from serving import training_run
from serving.page.dashboard import PAGE
from serving.training_run import MOST_POINTS, TrainingRun, encode
from tests.waiting import WAIT_S
from trinity.config import RUN_SETTINGS
from trinity.observability.run_history import note_export, write_stages
from trinity.observability.train_log import _cut


@pytest.fixture(autouse=True)
def always_fresh(monkeypatch):
    monkeypatch.setattr(training_run, "FRESH_S", 0.0)


def row(step, **changed):
    return {"step": step, "loss": 4.0 / step, "tokens": 100, "seconds": 0.5, "max_vio": 0.25, "skipped": 1} | changed


def write(folder, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_SETTINGS).touch()
    lines = _cut(folder / "metrics.jsonl", rows[0]["step"])
    for each in rows:
        lines.write(each)
    lines.close()


async def test_all_stages_are_shown_whichever_is_served(tmp_path):
    folders = [tmp_path / "1-pre", tmp_path / "2-anneal"]
    write_stages(tmp_path, [("pre", folders[0], 3, 64), ("anneal", folders[1], 9, 64)])
    write(folders[0], row(1), row(2, retries={"deadline": 2}), row(3, mfu=0.4), {"step": 3, "val_loss": 1.5})
    note_export(tmp_path, 3, "TrueBase")
    scores = [{"task": "niah", "mean": 0.75, "passes": True}]
    write(folders[1], row(1), {"step": 1, "scores": scores})
    found = await TrainingRun(str(folders[1])).tree()
    first, second = found["stages"]
    assert (first["name"], first["first"], first["last"], second["first"], second["last"], second["steps"]) == (
        "pre", 0, 3, 3, 4, 9
    )  # fmt: skip
    assert first["curves"]["step"] == [1, 2, 3]
    assert first["curves"]["loss"] == [4.0, 2.0, 1.3333]
    assert first["curves"]["tokens_per_s"] == [200, 200, 200]
    assert first["curves"]["mfu"] == [None, None, 0.4]
    assert "mfu" not in second["curves"], "what is nowhere is left out"
    assert (first["validations"], first["retries"], first["skipped"]) == ([(3, 1.5)], {"deadline": 2}, 1)
    assert second["scores"] == [{**scores[0], "step": 4}]
    assert found["exports"] == [(3, "TrueBase")]


async def test_a_log_that_is_cut_is_shown_as_it_is_now(tmp_path):
    run = TrainingRun(tmp_path)
    assert await run.tree() is None, "a folder without a run"
    write(tmp_path, *(row(step, retries={"deadline": 1}) for step in range(1, 6)))
    run = TrainingRun(tmp_path)
    assert (await run.tree())["stages"][0]["retries"] == {"deadline": 5}
    write(tmp_path, row(3, loss=7.0), row(4))
    [stage] = (await run.tree())["stages"]
    assert (stage["curves"]["step"], stage["curves"]["loss"][2]) == ([1, 2, 3, 4], 7.0)
    assert (stage["retries"], stage["last"]) == ({"deadline": 2}, 4)


async def test_long_runs_are_shown_in_few_points_that_keep_the_mean(tmp_path):
    num = 5000
    write(tmp_path, *(row(step, loss=float(step)) for step in range(1, num + 1)))
    [stage] = (await TrainingRun(tmp_path).tree())["stages"]
    steps, losses = stage["curves"]["step"], stage["curves"]["loss"]
    assert MOST_POINTS <= len(steps) <= 2 * MOST_POINTS
    assert steps[-1] == num
    assert steps == sorted(set(steps))
    widths = [after - before for before, after in zip([0, *steps], steps, strict=False)]
    assert sum(w * loss for w, loss in zip(widths, losses, strict=True)) == pytest.approx(num * (num + 1) / 2, rel=1e-3)


async def test_numbers_that_are_none_do_not_break_the_page(tmp_path):
    write(tmp_path, row(1, loss=None, seconds=0), {"step": 1, "val_loss": None}, {"step": 1, "scores": []})
    tree = json.loads(encode(await TrainingRun(tmp_path).tree(), 3, 2))
    assert tree["run"]["stages"][0]["curves"]["step"] == [1]
    assert (tree["version"], tree["quarantined"]) == (3, 2)


async def test_operators_see_it_and_others_do_not(start, tmp_path):
    write(tmp_path, row(1))
    keys = {"admin_key": "operators-key", "api_key": "clients-key"}
    async with (
        start(source=str(tmp_path), **keys) as server,
        httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http,
    ):
        answers = [
            await http.get("/dashboard/training", headers={"authorization": f"Bearer {key}"} if key else {})
            for key in (None, "clients-key", "operators-key")
        ]
    assert [answer.status_code for answer in answers] == [401, 401, 200]
    assert answers[2].json()["run"]["stages"][0]["last"] == 1
    assert answers[2].headers["cache-control"] == "no-store"


async def test_a_server_of_a_checkpoint_has_no_run(server):
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
        assert (await http.get("/dashboard/training")).json()["run"] is None


def test_the_page_asks_for_it():
    assert 'fetch("dashboard/training"' in PAGE.html
    assert 'id="curve-loss"' in PAGE.html
