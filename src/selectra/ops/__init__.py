"""Functions on tensors, each with a reference that is true and backends that are fast."""

from selectra.ops.add_norm import add_norm
from selectra.ops.causal_conv1d import causal_conv1d
from selectra.ops.cross_scan import cross_scan
from selectra.ops.dispatch import read_environment
from selectra.ops.gated_norm import gated_norm
from selectra.ops.selective_scan import selective_scan
from selectra.ops.ssd import ssd

read_environment()

__all__ = ["add_norm", "causal_conv1d", "cross_scan", "gated_norm", "selective_scan", "ssd"]
