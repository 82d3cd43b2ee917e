"""Classification of videos from several clips of each."""

import pytest
import torch

from selectra.data.clip_batches import ClipBatch
from selectra.errors import ConfigError
from selectra.tasks import ClipClassification
from selectra.tasks.clips import clip_scores


class Means(torch.nn.Module):
    """Scores from the mean colours."""

    def forward(self, x):
        return x.mean((2, 3, 4))


def test_probabilities_of_a_videos_clips_are_averaged():
    x, y = torch.randn(6, 3, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 2])
    found = clip_scores(Means(), ClipBatch(x, y), 3)
    expected = torch.stack([Means()(x)[i : i + 3].softmax(1).mean(0) for i in (0, 3)])
    torch.testing.assert_close(found.exp(), expected)
    evaluator = ClipClassification().evaluator()
    evaluator.update(Means(), ClipBatch(x, y))
    metrics = evaluator.compute()
    assert metrics["top1"] == (expected.argmax(1) == y).double().mean()
    assert metrics["loss"] == pytest.approx(float(-expected[[0, 1], y].log().mean()))


def test_one_clip_of_each_keeps_its_scores_and_others_are_refused():
    x = torch.randn(3, 3, 2, 4, 4)
    batch = ClipBatch(x, torch.tensor([0, 1, 2]))
    assert torch.equal(clip_scores(Means(), batch, 3), Means()(x))
    loss = ClipClassification().loss(Means(), batch)
    assert int(loss.count) == 3
    torch.testing.assert_close(loss.sum, torch.nn.functional.cross_entropy(Means()(x), batch.y, reduction="sum"))
    with pytest.raises(ConfigError, match=r"\(3, 4\) \(clips, classes\)"):
        clip_scores(Means(), batch, 4)
    with pytest.raises(ConfigError, match="3 clips do not divide among 2 videos"):
        clip_scores(Means(), ClipBatch(x, torch.tensor([0, 1])), 3)
