"""Whether models of a size can be trained here at all, told by their number of parameters before one is built."""

import torch

from selectra.errors import ConfigError
from selectra.language.generate import memory_of

# Bytes of a parameter in training: itself, its gradient, AdamW's two means, in float32; on a CPU the best one, too.
BYTES = {"cuda": 16, "cpu": 20}
GIB = 2**30


def fits(parameters: float, device: torch.device, side_by_side: int = 1) -> bool:
    """Whether the memory takes so many trainings at a time; True where it is not known how large it is."""
    room = memory_of(device)
    return room is None or side_by_side * parameters * BYTES[device.type] <= room


def require_room(name: str, parameters: float, device: torch.device, side_by_side: int = 1) -> None:
    """Raise unless the memory takes so many trainings at a time.

    Activations come on top: what passes may yet need more than there is.

    Raises:
        ConfigError: It does not; the message says how many parameters would fit.
    """
    if fits(parameters, device, side_by_side):
        return
    room, each = memory_of(device) or 0, BYTES[device.type]
    many = f", for {side_by_side} trainings side by side {side_by_side * parameters * each / GIB:,.4g} GiB"
    fewer = ", fewer --workers" if side_by_side > 1 else ""
    raise ConfigError(
        f"{name} with {parameters:,.0f} parameters is too large for this machine: a training needs {each} bytes "
        f"for each, {parameters * each / GIB:,.4g} GiB{many if side_by_side > 1 else ''}, and the "
        f"{'GPU has' if device.type == 'cuda' else 'machine has'} {room / GIB:,.4g} GiB. At most "
        f"{room / each / side_by_side:,.0f} parameters fit: take a smaller budget{fewer}, or a larger machine."
    )
