"""Attention of one query a row to all that its cache holds, on a GPU: what decoding needs of attention."""

from selectra.ops.cached_attention.cuda import attend, takes

__all__ = ["attend", "takes"]
