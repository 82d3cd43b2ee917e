"""Moving shapes: motions that clips show and single frames do not."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from selectra.data.image_draws import keys, uniforms
from selectra.data.moving_shapes import CLASSES, FINE, N_MOTION, N_SHAPE, MovingShapes, draw_clips, offsets
from selectra.errors import ConfigError

SIDE, FRAMES = 32, 8


def draws(count, seed=0):
    return uniforms(keys(seed, 0, torch.arange(count)), N_MOTION + 2 * N_SHAPE + 1)


@pytest.mark.parametrize("frame", [0, 3, FRAMES - 1])
def test_every_frame_is_as_likely_in_every_class(frame):
    # The start is uniform over the torus, and so it may be moved by what the motions differ in: the frame is the same
    # to the bit, and as likely. Starts are whole numbers of 1/256 pixel, which float32 draws hold exactly.
    u = draws(6)
    u[:, :2] = (u[:, :2] * SIDE * FINE).floor() / (SIDE * FINE)
    shown = []
    for label in range(len(CLASSES)):
        labels = torch.full((len(u),), label)
        moved = u.clone()
        gone = offsets(u[:, :N_MOTION], labels, FRAMES, SIDE)[:, frame]
        moved[:, :2] = ((u[:, :2] * SIDE * FINE).long() - gone).remainder(SIDE * FINE).float() / (SIDE * FINE)
        shown.append(draw_clips(moved, labels, FRAMES, SIDE, 1)[:, :, frame])
    assert all(torch.equal(shown[0], other) for other in shown[1:])
    labels = torch.ones(len(u), dtype=torch.long)
    # That the clips differ in some frame is what makes this a test.
    assert not torch.equal(
        draw_clips(u, labels, FRAMES, SIDE, 1)[:, :, 3], draw_clips(u, labels * 0, FRAMES, SIDE, 1)[:, :, 3]
    )


def moves(first, second):
    """How well the second frame is the first one moved each way."""
    first, second = (each - each.mean((1, 2), keepdim=True) for each in (first, second))
    each = [(first.roll(move, (1, 2)) * second).sum((1, 2)) for move in ((0, 1), (0, -1), (1, 0), (-1, 0))]
    return torch.stack(each, 1)


def test_a_classifier_of_one_frame_stays_at_chance_and_one_of_two_does_not():
    count = 480
    clips = MovingShapes(n_frames=2, train=count, test=count)
    seen = {}
    for part in ("train", "test"):
        batch = clips.windows(part).make(list(range(count)), 0, "cpu")
        frames = torch.nn.functional.avg_pool3d(batch.x, (1, 4, 4)).mean(1)
        seen[part] = (frames[:, 1].flatten(1).numpy(), moves(frames[:, 0], frames[:, 1]).numpy(), batch.y.numpy())
    chance, width = 1 / len(CLASSES), 4 * (5 / 36 / count) ** 0.5
    one, two = (
        LogisticRegression(max_iter=100).fit(seen["train"][i], seen["train"][2]).score(seen["test"][i], seen["test"][2])
        for i in (0, 1)
    )
    assert abs(one - chance) < width and two > chance + 2 * width


def test_clips_depend_on_seed_part_and_pass_alone():
    clips = MovingShapes(train=24, val=12, test=12)
    train = clips.windows("train")
    first = train[list(range(12))].to("cpu")
    assert first.x.shape == (12, 3, FRAMES, SIDE, SIDE) and first.y.tolist() == [*range(6)] * 2
    assert torch.equal(train.make([5, 3], 0, "cpu").x, first.x[[5, 3]])
    assert not torch.equal(train.make([5], 1, "cpu").x, first.x[[5]])
    test = clips.windows("test")
    test.at_pass(3, 9)
    assert torch.equal(test[[1]].to("cpu").x, clips.windows("test")[[1]].to("cpu").x)
    assert not torch.equal(test[[1]].to("cpu").x, clips.windows("val")[[1]].to("cpu").x)
    assert not torch.equal(MovingShapes(seed=1).windows("test")[[1]].to("cpu").x, test[[1]].to("cpu").x)


def test_the_control_shows_one_frame_of_the_same_clip():
    moving, still = (
        MovingShapes(still=each).windows("test").make(list(range(16)), 0, "cpu").x for each in (False, True)
    )
    assert all(torch.equal(still[:, :, 0], still[:, :, i]) for i in range(FRAMES))
    same = (still[:, :, :1] == moving).all(dim=(1, 3, 4))
    assert same.any(1).all() and len(set(same.float().argmax(1).tolist())) > 1


def test_a_shape_turns_around_a_place_that_stays():
    motion = draws(20)[:, :N_MOTION]
    both = [offsets(motion, torch.full((20,), label), FRAMES, SIDE).double() for label in (4, 5)]
    for each in both:
        radii = each.norm(dim=-1) / FINE / SIDE
        assert (radii - radii[:, :1]).abs().max() < 0.01 and radii.min() > 0.13
    cross = [(e[:, :-1, 0] * e[:, 1:, 1] - e[:, :-1, 1] * e[:, 1:, 0]) for e in both]
    # Rows grow downwards: clockwise turns from right to down.
    assert (cross[0] > 0).all() and (cross[1] < 0).all()


@pytest.mark.parametrize("wrong", [{"n_frames": 1}, {"img_size": 8}, {"train": 0}, {"n_still": -1}])
def test_too_little_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
        MovingShapes(**wrong)
