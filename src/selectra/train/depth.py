"""How deep each parameter of a model lies, by its stages or blocks; which of them are frozen, and what that changes."""

from typing import Any, Literal

from torch import nn

from selectra.errors import ConfigError

HEADS = ("head.", "aux_head.")


def units(model: Any) -> list[nn.Module]:
    """What stands one behind the other in a model: its stages, or its blocks where all have one resolution.

    A model says so by a method `units`, or has them under `stages` or `layers`.

    Raises:
        ConfigError: It has none of these.
    """
    if hasattr(model, "units"):
        return list(model.units())
    for name in ("stages", "layers"):
        found = getattr(model, name, None)
        if isinstance(found, nn.ModuleList) and len(found):
            return list(found)
    raise ConfigError(
        f"{type(model).__name__} has no stages or layers one behind the other; "
        "leave optim.layer_decay at 1 and train.freeze at 0."
    )


def depths(model: nn.Module) -> tuple[dict[str, int], int]:
    """The depth of every parameter by name, and the number n of units.

    0 is what comes before the first unit, such as the patches' embedding and positions; 1 to n are the units; n + 1 is
    what comes after them.
    """
    found = units(model)
    inside = {id(p): i + 1 for i, unit in enumerate(found) for p in unit.parameters()}
    # Parameters of the model itself, such as positions and class tokens, are named before those of its parts.
    by_name: dict[str, int] = {}
    seen_unit = False
    for name, parameter in model.named_parameters():
        depth = inside.get(id(parameter))
        seen_unit = seen_unit or depth is not None
        by_name[name] = depth if depth is not None else len(found) + 1 if seen_unit else 0
    return by_name, len(found)


def freeze(model: nn.Module, count: int | Literal["all"]) -> None:
    """Leave the first `count` units, and what is before them, as they are; or everything but the head.

    Raises:
        ConfigError: There are fewer units, or nothing would be left to train.
    """
    if count == 0:
        return
    if count == "all":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(HEADS))
    else:
        by_name, n_units = depths(model)
        if count > n_units:
            raise ConfigError(f"train.freeze is {count}, and {type(model).__name__} has {n_units} stages or blocks.")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(by_name[name] > count)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"train.freeze={count!r} leaves {type(model).__name__} nothing to train: it has no head.")


def training_mode(model: nn.Module) -> None:
    """Training mode, but for modules that are frozen: their batch norms keep their statistics."""
    model.train()
    for module in model.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()
