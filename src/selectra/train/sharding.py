"""Weights that are spread over processes (FSDP2): cut, gathered, copied, and made without ever being whole."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.spec import Run
from selectra.train.batch_norms import has_batch_norms
from selectra.train.parallel import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Gather = Literal["float32", "bfloat16"]


def mesh_of(world: World, kind: str) -> DeviceMesh:
    """All processes in one row, for tensors on devices of this kind."""
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415

    if kind not in world.meshes:
        world.meshes[kind] = init_device_mesh(kind, (world.size,))
    return world.meshes[kind]


def is_part(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor alone."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; it shares memory with it."""
    return tensor.to_local() if is_part(tensor) else tensor  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def require_gather(run: Run, model: nn.Module | None = None) -> None:
    """Look at whether weights can be gathered as `parallel.gather` says.

    Raises:
        ConfigError: Nothing is gathered, or what is computed in float32 would see rounded weights.
    """
    kind, precision = run.parallel.kind, run.train.precision
    if run.parallel.gather == "float32":
        return
    if kind != "fsdp2":
        raise ConfigError(f"parallel.gather=bfloat16 goes with parallel.kind=fsdp2; it is '{kind}'.")
    if precision != "bfloat16":
        raise ConfigError(f"parallel.gather=bfloat16 goes with train.precision=bfloat16; it is '{precision}'.")
    if model is not None and has_batch_norms(model):
        raise ConfigError(f"{type(model).__name__} has batch norms, which are of float32; leave parallel.gather.")


def shard(model: Any, world: World, gather: Gather = "float32") -> None:
    """Spread a model's parameters over the processes, in place: block by block where the model says what these are.

    While a block runs, forward or backward, its weights are gathered; those outside of blocks are gathered throughout.

    Args:
        gather: The type that they are gathered in. Gradients are summed in float32, and parts are float32 in any case.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method  # noqa: PLC0415

    # Outputs that are views are not written to by our models.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh, policy = mesh_of(world, world.device.type), MixedPrecisionPolicy()
    if gather == "bfloat16":
        # Inputs stay as they are: autocast rounds those of products, and a stream of float32 goes through blocks.
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks() if hasattr(model, "blocks") else ():
        fully_shard(block, mesh=mesh, mp_policy=policy)
        for name in getattr(block, "calls", ()):
            register_fsdp_forward_method(block, name)
    fully_shard(model, mesh=mesh, mp_policy=policy)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside the block the weights are whole in every process, which may then call the model however often it wants.

    Without this a call is a joint act of all processes: with unequal numbers of calls they would wait for ever.
    """
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            # The outermost one stays whole between forward and backward, as `fully_shard` has it by default.
            part.set_reshard_after_forward(part is not model, recurse=False)


def on_cpu(tensor: Tensor, world: World) -> Tensor:
    """A copy on the CPU that later steps do not change: of a part, a part."""
    if not is_part(tensor):
        return tensor.detach().to("cpu", copy=True).contiguous()
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    whole: DTensor = tensor  # pyright: ignore[reportAssignmentType]
    return DTensor.from_local(
        whole.to_local().detach().to("cpu", copy=True), mesh_of(world, "cpu"), whole.placements, run_check=False,
        shape=whole.shape, stride=whole.stride(),
    )  # fmt: skip


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor in every process; each has to ask for it."""
    return tensor.full_tensor() if is_part(tensor) else tensor  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


@torch.no_grad()
def start_in_parts(model: nn.Module, world: World) -> None:
    """Give a model on the device "meta", already cut, its weights, without their ever being whole.

    Modules draw them as they do alone, by `reset_parameters` and last the model's own `start`, each process the rows
    that it holds: how a row starts depends on its length, and not on how many there are. Draws depend on the number of
    processes.

    Raises:
        ConfigError: A module does not say how its weights start.
    """
    model.to_empty(device=world.device)
    if next(model.buffers(), None) is not None:
        raise ConfigError(f"{type(model).__name__} has buffers, which cannot start in parts; leave parallel.in_parts.")
    owners = [module for module in model.modules() if module._parameters]
    kept = [dict(module._parameters) for module in owners]
    for module in owners:
        module._parameters.update(
            {name: None if p is None else nn.Parameter(local(p.detach())) for name, p in module._parameters.items()}
        )
    try:
        _reset(model, type(model).__name__)
    finally:
        for module, parameters in zip(owners, kept, strict=True):
            module._parameters.update(parameters)


def _reset(module: Any, name: str) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
        return
    if any(p is not None for p in module._parameters.values()):
        raise ConfigError(f"'{name}' does not say how its weights start (reset_parameters); leave parallel.in_parts.")
    for part, child in module.named_children():
        _reset(child, f"{name}.{part}")
    if hasattr(module, "start"):
        module.start()


@torch.no_grad()
def put(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put weights that `on_cpu` copied back into a model that is cut in the same way."""
    for name, tensor in model.state_dict().items():
        local(tensor).copy_(local(weights[name]))
