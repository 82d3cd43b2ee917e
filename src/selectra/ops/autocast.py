"""The autocast rule that all operators share."""

from typing import Any

import torch

AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def keep_types_under_autocast(library: torch.library.Library, name: str) -> None:
    """Register the rule: activations keep the types they come in, parameters and states stay float32.

    Without it autocast would stay switched on inside the operator and round the products of a backend that is written
    in PyTorch.
    """
    operator = getattr(torch.ops.selectra, name)

    def rule(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
            return operator(*args)

    for key in ("AutocastCPU", "AutocastCUDA"):
        library.impl(name, rule, key)
