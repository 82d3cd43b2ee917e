"""What operators say to the transforms of PyTorch that only plain operations follow."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad
from torch.utils import _python_dispatch as modes

from selectra.errors import BackendError

# Whatever else has its own rules.
PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


class Onlooker(modes.TorchDispatchMode):
    """Looks at what runs and changes nothing. What goes past the dispatcher is told to it (`tell`)."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether what is compiled stays so: under other modes PyTorch runs it uncompiled, which rounds otherwise."""
        return True

    def ran(self, operator: str, backend: str) -> None:
        """`operator` ran on `backend`."""
        raise NotImplementedError


def tell(backends: dict[str, str]) -> None:
    """Tell whoever looks on what operators ran on, from where the dispatcher does not see them."""
    if _moded():
        for mode in modes._get_current_dispatch_mode_stack():
            if isinstance(mode, Onlooker):
                for operator, backend in backends.items():
                    mode.ran(operator, backend)


def needs_operators(tensors: Iterable[Tensor | None]) -> bool:
    """Whether more than one node for several operators must see a call. Such a node rounds otherwise than they do, and
    an onlooker must not change what is computed: the node tells it what it runs.
    """
    return needs_dispatcher(tensors, _moded_by_others)


def _moded() -> bool:
    return torch._C._len_torch_dispatch_stack() > 0


def _moded_by_others() -> bool:
    return _moded() and not all(isinstance(mode, Onlooker) for mode in modes._get_current_dispatch_mode_stack())


def needs_dispatcher(tensors: Iterable[Tensor | None], moded: Callable[[], bool] = _moded) -> bool:
    """Whether more than a kernel must see a call: a compiler, a tracer, a transform, a mode, a kind of tensor.

    Autocast is not among them: it must not change what a backend computes that is asked without it.
    """
    return (
        # Inside torch.compile this is a constant, and what follows is not looked at.
        torch.compiler.is_compiling()
        or _functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or moded()
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()  # pyright: ignore[reportAttributeAccessIssue]
        or not PLAIN.issuperset(map(type, tensors))
    )


def transformed(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a transform is at work, or a tensor has its own rules."""
    return _functorch.maybe_current_level() is not None or not PLAIN.issuperset(map(type, tensors))


def is_batched(grad: Tensor | None) -> bool:
    """Whether it is several gradients in one, as `torch.autograd.grad(is_grads_batched=True)` hands to a backward."""
    return grad is not None and not torch.compiler.is_compiling() and _functorch.is_legacy_batchedtensor(grad)


def refuse_transforms(name: str, tensors: Iterable[Tensor | None]) -> None:
    """Raise inside torch.func's gradients, and where a tensor carries a tangent, which would be lost in silence.

    A call outside them pays for two reads.
    """
    # Inside torch.compile the call below is a constant.
    if _functorch.maybe_current_level() is not None:
        stack = _functorch.peek_interpreter_stack()
        if stack is not None and stack.key() in (_functorch.TransformType.Grad, _functorch.TransformType.Jvp):
            raise BackendError(_only_the_reference(name, "a transform of torch.func (grad, vjp, jacrev, jvp, ...)"))
    if forward_ad._current_level >= 0:
        refuse_tangents(name, tensors)


def refuse_tangents(name: str, tensors: Iterable[Tensor | None]) -> None:
    """Raise where forward-mode differentiation goes on and a tensor carries a tangent."""
    if forward_ad._current_level >= 0 and any(_has_tangent(x) for x in tensors if x is not None):
        raise BackendError(_only_the_reference(name, "forward-mode differentiation (torch.func.jvp, dual numbers)"))


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def register_refusals(library: torch.library.Library, name: str) -> None:
    """Register words for second derivatives and vmap, for the operator `name` and its backward."""

    def no_second_order(ctx: Any, *grads: Tensor) -> None:
        raise BackendError(_only_the_reference(name, "a gradient of its gradient"))

    def no_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise BackendError(
            f"{name}: torch.func.vmap is not supported; the operator is batched already, "
            "move the mapped dimension into b."
        )

    torch.library.register_autograd(f"selectra::{name}_backward", no_second_order, lib=library)
    for operator in (name, f"{name}_backward"):
        torch.library.register_vmap(f"selectra::{operator}", no_vmap, lib=library)


def _only_the_reference(name: str, what: str) -> str:
    return (
        f"{name}: {what} was asked for; only the reference has one: wrap the call in `with {name}.using('reference'):`."
    )
