"""Time that a shard may take for rows which another one could compute, too."""

import math

LEAST_S = 0.75  # a process may be held up for so long for no reason of the shard's
MULTIPLE = 10.0  # of what it usually takes
FIXED_ROWS = 64  # what a call costs beside its rows, in rows
NEWS = 0.1  # weight of the newest call in what is usual


class Patience:
    """Patience of one caller with each shard. At most `most_s`, which it is before the first answer; inf: without end."""

    def __init__(self, most_s: float):
        self.most_s, self._row_s = most_s, dict[str, float]()

    def of(self, shard: str, num_rows: int) -> float:
        """-> seconds."""
        row_s = self._row_s.get(shard)
        if row_s is None or self.most_s == math.inf:
            return self.most_s
        return min(self.most_s, max(LEAST_S, MULTIPLE * row_s * (num_rows + FIXED_ROWS)))

    def took(self, shard: str, num_rows: int, seconds: float) -> None:
        """It answered."""
        row_s = seconds / (num_rows + FIXED_ROWS)
        usual_s = self._row_s.get(shard, row_s)
        self._row_s[shard] = usual_s + NEWS * (row_s - usual_s)

    def was_late(self, shard: str) -> None:
        """Its time was up: it has vanished, or all that it does takes longer now, and it is to have more next time."""
        if shard in self._row_s:
            self._row_s[shard] = min(2 * self._row_s[shard], self.most_s / (MULTIPLE * FIXED_ROWS))
