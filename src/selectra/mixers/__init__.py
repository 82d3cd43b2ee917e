"""Mixers keep the shape `(b, l, d)` and mix across positions or channels."""

from selectra.mixers.attention import CausalAttention, KeyValue
from selectra.mixers.bidirectional import Bidirectional
from selectra.mixers.cross_scan_2d import CrossPaths, CrossScan2d
from selectra.mixers.discretised import DiscretisedS6, Discretisation, make_s6
from selectra.mixers.einfft import EinFFT
from selectra.mixers.monarch import Monarch, MonarchMLP
from selectra.mixers.s6 import S6, SelectivePath, State
from selectra.mixers.selective_channel import SelectiveChannel
from selectra.mixers.ssd import SSD
from selectra.mixers.stack import step_blocks_
from selectra.mixers.weighted_average import WeightedAverage

__all__ = [
    "S6",
    "SSD",
    "Bidirectional",
    "CausalAttention",
    "CrossPaths",
    "CrossScan2d",
    "DiscretisedS6",
    "Discretisation",
    "EinFFT",
    "KeyValue",
    "Monarch",
    "MonarchMLP",
    "SelectiveChannel",
    "SelectivePath",
    "State",
    "WeightedAverage",
    "make_s6",
    "step_blocks_",
]
