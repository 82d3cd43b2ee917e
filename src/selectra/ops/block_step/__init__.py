"""One position through whole Mamba blocks on a GPU, in one launch; `ops/native` has the same for a CPU."""

from selectra.ops.block_step.cuda import CudaStepPlan, run, takes

__all__ = ["CudaStepPlan", "run", "takes"]
