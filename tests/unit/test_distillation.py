"""A student on text with a teacher: the divergence is that of the distributions, and falls."""

import pytest
import torch

from tests.unit.test_preference_runs import Told
from tests.unit.test_trainer import config_for, texts  # noqa: F401  a fixture
from trinity.config import Config
from trinity.data.prepare import prepare
from trinity.errors import ConfigError
from trinity.models.common.attention import PackedAttention, packed_positions
from trinity.pool.local import local_pool
from trinity.rl.distillation import divergence
from trinity.rl.kinds import check, trainer_kind
from trinity.rpc.messages import Load
from trinity.text.tokenizer import Tokenizer
from trinity.train.collectives import Alone


def trainer_for(config):
    pool = local_pool(config.model, Load(), num_shards=2, optim=config.optim, backend="torch")
    data = prepare(config.data, config.train, config.model, config.train.out_dir)
    trainer = trainer_kind(config)(config, pool, data, Alone())
    trainer.start()
    return trainer


@pytest.fixture
def taught(texts, tmp_path):  # noqa: F811
    """-> the teacher, which has learned a little, and the settings of a student of it with another seed."""
    base = config_for(texts, tmp_path / "teacher")
    teacher = trainer_for(base)
    for _ in range(3):
        teacher.step()
    own = {"out_dir": str(tmp_path / "student"), "seed": 7}
    data = {"tokenizer": str(teacher.save())}
    return teacher, base.replace(train=own, data=data, distill={"teacher": data["tokenizer"], "top_k": 5})


def test_all_tokens_or_some_and_the_rest():
    rng = torch.Generator().manual_seed(2)
    p_CV, q_CV = (torch.randn(7, 30, generator=rng).log_softmax(-1) for _ in range(2))
    every = p_CV.topk(30)
    full_C = (p_CV.exp() * (p_CV - q_CV)).sum(1)
    torch.testing.assert_close(divergence(q_CV, every.indices, every.values), full_C, atol=1e-5, rtol=1e-4)
    some = p_CV.topk(4)
    found_C = divergence(q_CV, some.indices, some.values)
    for row in range(7):
        kept = some.indices[row]
        p, q = p_CV[row].exp(), q_CV[row].exp()
        rest_p, rest_q = 1 - p[kept].sum(), 1 - q[kept].sum()
        want = (p[kept] * (p[kept] / q[kept]).log()).sum() + rest_p * (rest_p / rest_q).log()
        assert found_C[row] == pytest.approx(float(want), abs=1e-5)
    assert (found_C <= full_C + 1e-6).all(), "buckets tell less"
    assert (found_C >= 0).all()
    same = q_CV.topk(4)
    torch.testing.assert_close(divergence(q_CV, same.indices, same.values), torch.zeros(7), atol=1e-5, rtol=0)


def test_a_step_has_the_loss_of_both_models_and_it_falls(taught):
    teacher, config = taught
    student, told = trainer_for(config), Told()
    student.logs = [told]
    want, num = 0.0, 0
    for micro in range(2):
        batch = student.micro_batches.batch(student.data.train, 0, micro)
        logits = []
        for trainer in (teacher, student):
            trainer.dispatcher.use(trainer.version)
            attend = PackedAttention(config.model, batch.docs_BS, *batch.ids_BS.shape)
            with torch.no_grad():
                out = trainer.model(batch.ids_BS.flatten(), packed_positions(*batch.ids_BS.shape), attend)
                logits.append(trainer.model.logits(out.hidden_TD).log_softmax(-1))
        best = logits[0].topk(5)
        want += float(divergence(logits[1], best.indices, best.values).sum())
        num += batch.num_trained
    first = student.step()
    assert first.loss == pytest.approx(want / num, rel=1e-4)
    assert first.measures == {"teacher_divergence": pytest.approx(first.loss, rel=1e-5)}
    later = [student.step() for _ in range(5)]
    assert later[-1].measures["teacher_divergence"] < 0.7 * first.loss
    assert student.evaluate() > 0
    assert told.validations[-1][2] == {}


def test_cross_entropy_has_its_share(taught):
    _, config = taught
    plain, both = (trainer_for(config.replace(distill={"ce": ce})) for ce in (0.0, 0.5))
    usual = trainer_for(config.replace(distill={"teacher": None}))
    assert both.step().loss == pytest.approx(plain.step().loss + 0.5 * usual.step().loss, rel=1e-5)


def test_teachers_that_cannot_be_are_refused(taught, tmp_path):
    _, config = taught
    for sections, says in (
        ({"data": {"format": "pairs"}}, "teaches text and chats, not data.format pairs"),
        ({"distill": {"top_k": 1000}}, "top_k is 1000; the vocabulary has 300"),
    ):
        with pytest.raises(ConfigError, match=says):
            check(Config.from_tree(config.model_dump()).replace(**sections))
    Tokenizer.train(iter(["other words"]), 290).save(tmp_path / "words")
    with pytest.raises(ConfigError, match="has another tokenizer"):
        trainer_for(config.replace(data={"tokenizer": str(tmp_path / "words")}))
