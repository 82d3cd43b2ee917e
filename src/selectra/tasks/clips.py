"""Classification of clips: as of images, with the probabilities of a video's clips averaged."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.registry import tasks
from selectra.tasks.classification import AccuracyEvaluator, Classification, LabelledImages


def clip_scores(model: nn.Module, batch: LabelledImages, n_classes: int | None) -> Float[Tensor, "b k"]:
    """The scores of every video: those of its clip, or the logarithm of its clips' mean probability.

    Raises:
        ConfigError: They are not one for each class of each clip, or the clips do not divide among the videos.
    """
    scores = model(batch.x)
    wanted = (len(batch.x), scores.shape[-1] if n_classes is None else n_classes)
    if scores.shape != wanted:
        raise ConfigError(
            f"{type(model).__name__} gives scores of shape {tuple(scores.shape)}, and the data asks for {wanted} "
            "(clips, classes)."
        )
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    views, rest = divmod(len(batch.x), max(1, len(batch.y)))
    if rest:
        raise ConfigError(f"{len(batch.x)} clips do not divide among {len(batch.y)} videos.")
    if views <= 1:
        return scores
    return scores.unflatten(0, (-1, views)).log_softmax(-1).logsumexp(1) - torch.tensor(float(views)).log().item()


class ClipEvaluator(AccuracyEvaluator):
    """Sums over videos, whose clips count together."""

    scores = staticmethod(clip_scores)


@tasks.register("clip_classification", kind="video")
class ClipClassification(Classification):
    """Say of which class a video is; the probabilities of several clips of it are averaged.

    Args:
        label_smoothing: Share of the target that is spread evenly over all classes (arXiv:1512.00567).
        select: By which metric on the validation videos the weights are kept: the share of correct first choices, or
            the cross-entropy.
    """

    scores = staticmethod(clip_scores)

    def evaluator(self) -> ClipEvaluator:
        """A fresh evaluator."""
        return ClipEvaluator(self.n_classes)
