"""What a part of a sequence makes of a zero state, and of a zero adjoint behind it, by scanning one end of the part.

What lies so far from that end that it is forgotten there, to far below rounding, is left out; then nothing of what the
part is handed goes through it either. Where memories are longer than the part, all of it is scanned.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from selectra.ops.selective_scan import selective_scan
from selectra.ops.selective_scan.call import SOFTPLUS_THRESHOLD, ScanCall

# A state that has decayed by exp(-50), or exp(-100) in float64, is forgotten: rounding is exp(-17) and exp(-37).
FORGOTTEN = {torch.float32: 50.0, torch.float64: 100.0}
# An end is looked at in lengths that double from here on; steps are added up in pieces of as many positions.
FIRST_END, PIECE = 1024, 16384


def forward_effect(call: ScanCall) -> tuple[Tensor, Tensor]:
    """The state that the part leaves where none came, (b, d, n), and the sum of its steps, (b, d).

    Where its last positions forget all before, the sum is theirs.
    """
    call = _without_gradient(call)
    length = end_length(call)
    end = _narrowed(call, call.u.shape[1] - length, length)
    _, state = selective_scan.run(end._replace(z=None, return_final_state=True))
    return state, _sum(end, 0, length)


def backward_effect(call: ScanCall, dy: Tensor) -> Tensor:
    """The gradient of the state before the part, (b, d, n), of the outputs of the part alone: by its first positions.

    Args:
        dy: Gradient of y.
    """
    call = _without_gradient(call)
    length = end_length(call._replace(reverse=not call.reverse))
    start = _narrowed(call, 0, length)
    state = call.A.new_zeros(call.u.shape[0], *call.A.shape)
    if not length:
        return state
    with torch.enable_grad():
        # The gradient hangs neither on the state nor on u.
        state.requires_grad_()
        y = selective_scan.run(start._replace(initial_state=state, return_final_state=False))
        return torch.autograd.grad(y, state, _positions(dy, call, 0, length), materialize_grads=True)[0]


def _without_gradient(call: ScanCall) -> ScanCall:
    """The call for its own tensors alone: without skip and without the state before the part."""
    detached = {name: x.detach() for name, x in call._asdict().items() if isinstance(x, Tensor)}
    return call._replace(**detached)._replace(D=None, initial_state=None)


def _narrowed(call: ScanCall, start: int, length: int) -> ScanCall:
    """Positions start .. start + length in scan order."""
    names = ("u", "delta", "B", "C", "z", "mask")
    return call._replace(**{name: _positions(getattr(call, name), call, start, length) for name in names})


def _positions(x: Tensor | None, call: ScanCall, start: int, length: int) -> Tensor | None:
    if x is None:
        return None
    return x.narrow(1, x.shape[1] - start - length if call.reverse else start, length)


@torch.no_grad()
def end_length(call: ScanCall) -> int:
    """How many last positions of a part decide the state behind it: all, or as many as it takes to forget the rest.

    Without softplus a step may be negative, and then nothing is known of the steps before those that were seen.
    """
    total_length, A = call.u.shape[1], call.A
    if not call.delta_softplus or not total_length:
        return total_length
    slowest, limit = A.amax(1), -FORGOTTEN[A.dtype]
    total = _no_steps(call)
    seen, length = 0, min(FIRST_END, total_length)
    while length < total_length:
        start = seen if call.reverse else total_length - length
        total += _sum(call, start, length - seen)
        # Not-a-number is never forgotten.
        if bool((total * slowest <= limit).all()):
            return length
        seen, length = length, 2 * length
    return total_length


def _no_steps(call: ScanCall) -> Tensor:
    return call.A.new_zeros(call.delta.shape[0], call.delta.shape[2])


def _sum(call: ScanCall, start: int, length: int) -> Tensor:
    """The sum of the steps of some positions, (b, d)."""
    total = _no_steps(call)
    for at in range(start, start + length, PIECE):
        n = min(PIECE, start + length - at)
        mask = None if call.mask is None else call.mask.narrow(1, at, n)
        total += _steps(call.delta.narrow(1, at, n), call.delta_bias, mask, call.delta_softplus, call.A.dtype).sum(1)
    return total


def _steps(delta: Tensor, bias: Tensor | None, mask: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    """Steps as the scan takes them: after bias and softplus, 0 at absent positions, whatever stands there."""
    if mask is not None:
        delta = delta.masked_fill(~mask[..., None], 0)
    delta = delta.to(dtype)
    if bias is not None:
        delta = delta + bias
    if softplus:
        delta = F.softplus(delta, threshold=SOFTPLUS_THRESHOLD)
    return delta if mask is None else delta.masked_fill(~mask[..., None], 0)
