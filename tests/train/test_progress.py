"""The time left, told by a clock that does not run: it counts everything, is right, and does not jump."""

import random
from math import isnan

import pytest

from selectra.train.progress import FIRST, Clock, duration

STEPS, EVAL_EVERY, SAVE_EVERY = 3000, 250, 500
EVALUATION, CHECKPOINT, HICCUP = 9.0, 14.0, 20.0


class Time:
    """A time that passes when it is told to."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def events(seed: int) -> list[tuple[str, int, float]]:
    """A training: what happens, after which step, and how long it takes."""
    draw = random.Random(seed)
    found = []
    for step in range(1, STEPS + 1):
        # A slow first step, the wait for data at every tenth, and two hiccups.
        seconds = 0.1 * draw.uniform(0.7, 1.3) + (0.25 if step % 10 == 0 else 0.0)
        seconds += {1: 30.0, 400: HICCUP, 1700: HICCUP}.get(step, 0.0)
        found.append(("step", step, seconds))
        if step % EVAL_EVERY == 0:
            found.append(("evaluation", step, EVALUATION * draw.uniform(0.9, 1.1)))
        if step % SAVE_EVERY == 0:
            found.append(("checkpoint", step, CHECKPOINT * draw.uniform(0.9, 1.1)))
    return found


def told(seed: int, begin: int = 0) -> list[tuple[int, float, float, float]]:
    """After each step of a training: the step, the time that is left in truth, the time that is told, and the jump."""
    time, found, before = Time(), [], None
    clock = Clock(STEPS, EVAL_EVERY, (1, 40), SAVE_EVERY, begin, now=time)
    happens = [event for event in events(seed) if event[1] > begin]
    left = sum(seconds for _, _, seconds in happens)
    for what, step, seconds in happens:
        time.at += seconds
        left -= seconds
        clock.took(what, seconds, step)
        if what == "step" and step >= begin + FIRST:
            shown = clock.shown(step)
            jump = 0.0 if before is None else shown - max(before[0] - (time.at - before[1]), 0.0)
            before = shown, time.at
            found.append((step, left, shown, jump))
    return found


@pytest.mark.parametrize("begin", [0, 1250])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_time_left_is_right_once_everything_was_seen_once(seed, begin):
    """After the first checkpoint: within a tenth of the truth and, towards the end, within one checkpoint."""
    for step, left, shown, _ in told(seed, begin):
        if step > begin + SAVE_EVERY + 200:
            assert shown == pytest.approx(left, rel=0.1, abs=CHECKPOINT), step


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_time_left_does_not_jump(seed):
    """It goes down as time passes, but for less than a twentieth of it at a time, whatever a single step does."""
    rows = told(seed)
    for step, _, shown, jump in rows:
        assert abs(jump) < 0.05 * shown + 1.0, step
    hiccup = next(row for row in rows if row[0] == 400)
    assert abs(hiccup[3]) < 0.05 * hiccup[2]


def test_evaluations_and_checkpoints_are_counted_before_they_come():
    clock = Clock(steps=100, eval_every=10, batches=(1, 30), save_every=20)
    for _ in range(20):
        clock.took("step", 1.0)
    clock.took("evaluation", 5.0, step=10)
    # Nine evaluations, that after step 20 and the last included, and five checkpoints of a length not known yet.
    assert clock.left(20) == pytest.approx(80 + 9 * 5)
    clock.took("evaluation", 5.0, step=20)
    clock.took("checkpoint", 3.0, step=20)
    assert clock.left(20) == pytest.approx(80 + 8 * 5 + 4 * 3)
    clock.took("evaluation", 5.0, step=90)
    assert clock.left(95) == pytest.approx(5 + 5 + 4 * 3)
    clock.took("checkpoint", 3.0, step=80)
    assert clock.left(95) == pytest.approx(5 + 5 + 3)


def test_until_everything_was_timed_the_time_is_said_to_be_more():
    clock = Clock(steps=100, eval_every=10, batches=(1, 30), save_every=20)
    for what in ("step", "evaluation", "checkpoint"):
        assert not clock.knows_all
        clock.took(what, 1.0)
    assert clock.knows_all


def test_after_the_very_first_steps_nothing_is_told():
    clock = Clock(steps=100, eval_every=10, batches=(1, 30))
    clock.took("step", 60.0)
    assert isnan(clock.shown(1))
    for _ in range(FIRST):
        clock.took("step", 1.0)
    assert clock.shown(1 + FIRST) < 300


def test_before_an_evaluation_was_timed_it_is_guessed_from_steps():
    clock = Clock(steps=100, eval_every=10, batches=(1, 30))
    assert not clock.started
    for _ in range(20):
        clock.took("step", 1.0)
    # Ten evaluations of 30 forward passes, at a third of a step each.
    assert clock.left(20) == pytest.approx(80 + 10 * 10)


def test_a_training_that_was_gone_on_with_counts_what_is_left():
    clock = Clock(steps=100, eval_every=10, batches=(1, 30), save_every=10, begin=80)
    clock.took("step", 1.0)
    clock.took("evaluation", 5.0, step=90)
    assert clock.left(90) == pytest.approx(10 + 5)


def test_durations():
    assert [duration(x) for x in (0.4, 59, 61, 3700)] == ["0 s", "59 s", "1 min 01 s", "1 h 01 min"]
