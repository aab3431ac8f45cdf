"""Which shards have started again, as the control loop counts them: callers are told to locate those anew."""

import numpy as np
import pytest

from actors.control.health import LATE, Watch
from trinity.placement.table import PlacementTable
from trinity.rpc.messages import ShardStatus

TABLE = PlacementTable.spread((0,), 1, ("a",))
STATUS = ShardStatus("a", 3, "torch", "cpu", 1, 8, 0, 0, (3,), 0, {0: {0: 5}})
HERE, AGAIN, ELSEWHERE = ("node-1", 11), ("node-1", 12), ("node-2", 11)


@pytest.mark.parametrize(
    ("answers", "num"),
    [
        ([HERE, HERE], 0),
        ([HERE, AGAIN], 1),
        ([HERE, ELSEWHERE], 1),  # containers number their processes alike
        ([HERE, None, AGAIN, AGAIN], 1),
        ([HERE, LATE, HERE], 0),
        ([HERE, LATE, LATE, LATE, HERE], 1),
        ([LATE, HERE], 0),  # it was only slow to answer at first
        ([None, HERE], 1),  # away when this service started
    ],
)
def test_a_shard_that_has_started_again_is_counted(answers, num):
    watch = Watch(TABLE, 10.0)
    for answer in answers:
        found = answer if answer in (None, LATE) else (STATUS, answer)
        watch.seen = {"a": watch._note(TABLE, "a", found, 1.0, np.zeros((1, 1)))}
    assert watch.num_recoveries == num
