"""Trained image models in use: what is on an image, and what the model looks at."""

from selectra.classifier.explaining import explain
from selectra.classifier.predicting import Prediction, predict
from selectra.classifier.trained import Trained, from_run, from_weights

__all__ = ["Prediction", "Trained", "explain", "from_run", "from_weights", "predict"]
