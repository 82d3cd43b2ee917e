"""Mixers keep the shape `(b, l, d)` and mix across positions or channels."""

from selectra.mixers.attention import CausalAttention, KeyValue
from selectra.mixers.bidirectional import Bidirectional
from selectra.mixers.cross_scan_2d import CrossPaths, CrossScan2d
from selectra.mixers.discretised import Discretisation, DiscretisedS6, make_s6
from selectra.mixers.einfft import EinFFT
from selectra.mixers.monarch import Monarch, MonarchMLP
from selectra.mixers.row_block import RowBlock
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
    "Discretisation",
    "DiscretisedS6",
    "EinFFT",
    "KeyValue",
    "Monarch",
    "MonarchMLP",
    "RowBlock",
    "SelectiveChannel",
    "SelectivePath",
    "State",
    "WeightedAverage",
    "make_s6",
    "step_blocks_",
]
