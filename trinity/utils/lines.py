"""Names of versions of the weights: one number for a step, and for the line of steps that it belongs to.

A run that goes back begins another line: the same steps come again, with other weights. Decision: the line stands above the
step in one integer, so whatever holds, sends, compares or stores a version names its line, too, and versions of a later line
are greater. Line 0 is of weights that no run makes, a checkpoint's; who asks for one of it asks for a step, whatever its line.
"""

STEP_BITS = 30


def named(line: int, step: int) -> int:
    """The version's name; -1, no version, stays what it is."""
    return step if step < 0 else line << STEP_BITS | step


def step_of(version: int) -> int:
    return version if version < 0 else version & ((1 << STEP_BITS) - 1)


def line_of(version: int) -> int:
    return max(0, version) >> STEP_BITS


def oldest_of(version: int, max_age: int | None) -> int:
    """The oldest version of its line that is at most so many steps older; None: any age."""
    step = 0 if max_age is None else max(0, step_of(version) - max_age)
    return named(line_of(version), step)
