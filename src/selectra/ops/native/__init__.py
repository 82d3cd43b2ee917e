"""The compiled CPU kernels: C++ for several instruction sets, chosen at run time, and how they are found and called."""

from selectra.ops.native.library import NativeStatus, status

__all__ = ["NativeStatus", "status"]
