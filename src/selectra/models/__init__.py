"""The architectures: one file each, one line each."""

from .dlinear import DLinear as DLinear
from .linear import Linear as Linear
from .naive import Naive as Naive
from .naive import SeasonalNaive as SeasonalNaive
from .timemachine import TimeMachine as TimeMachine
from .tsm2 import TSM2 as TSM2
