"""What a model is trained for: a loss as a sum and a count, and metrics that no batch size can change."""

from selectra.tasks.classification import Classification
from selectra.tasks.clips import ClipClassification
from selectra.tasks.detection import Detection
from selectra.tasks.forecasting import Forecasting
from selectra.tasks.language import Language
from selectra.tasks.segmentation import Segmentation
from selectra.tasks.task import Evaluator, Loss, Task

__all__ = [
    "Classification",
    "ClipClassification",
    "Detection",
    "Evaluator",
    "Forecasting",
    "Language",
    "Loss",
    "Segmentation",
    "Task",
]
