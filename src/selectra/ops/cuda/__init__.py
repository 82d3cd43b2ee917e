"""What all CUDA backends share: kernels compiled at run time, launched on torch's streams, or refused in words."""

from selectra.ops.cuda.compiler import compile_only
from selectra.ops.cuda.runtime import Kernel, is_cooperative, kernel, multiprocessors, shared_limit
from selectra.ops.cuda.support import CudaStatus, capability, refusal, status

__all__ = [
    "CudaStatus",
    "Kernel",
    "capability",
    "compile_only",
    "is_cooperative",
    "kernel",
    "multiprocessors",
    "refusal",
    "shared_limit",
    "status",
]
