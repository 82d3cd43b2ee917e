"""Language modelling: cross-entropy of the next token, in nats."""

import math
from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.layers.moe import balance
from selectra.registry import tasks
from selectra.tasks.task import Loss

# As the data marks positions without a target, and PyTorch's cross-entropy expects it.
IGNORED = -100


class Text(Protocol):
    """What the task reads of a batch."""

    @property
    def tokens(self) -> Int[Tensor, "b l"]: ...
    @property
    def targets(self) -> Int[Tensor, "b l"]: ...
    @property
    def cu_seqlens(self) -> Int32[Tensor, " borders"] | None: ...


def nats(logits: Float[Tensor, "b l v"], targets: Int[Tensor, "b l"]) -> Float[Tensor, ""]:
    """The sum of negative log-likelihoods of all targets, in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def measured(model: nn.Module, batch: Text) -> Float[Tensor, " 3"]:
    """Of a batch's targets, in float64: the sum of negative log-likelihoods, how many, and how many are most likely."""
    logits = model(batch.tokens, cu_seqlens=batch.cu_seqlens)
    hits = (logits.argmax(-1) == batch.targets).sum()
    return torch.stack(
        [each.double() for each in (nats(logits, batch.targets), (batch.targets != IGNORED).sum(), hits)]
    )


def metrics_of(sums: Float[Tensor, " 3"]) -> dict[str, float]:
    """What sums of `measured` come to: nats a token, their perplexity, and the share of most likely tokens."""
    total, count, hits = sums.tolist()
    loss = total / count if count else math.nan
    accuracy = hits / count if count else math.nan
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": accuracy}


class LanguageEvaluator:
    """Sums over targets, in float64: the batch size changes nothing."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)

    def update(self, model: nn.Module, batch: Text) -> None:
        """Add one batch."""
        self.sums += measured(model, batch).cpu()

    def reduce(self, gather: Callable[[Any], list[Any]]) -> None:
        """Add the sums of all processes."""
        self.sums = torch.stack(gather(self.sums)).sum(0)

    def compute(self) -> dict[str, float]:
        """The mean negative log-likelihood in nats a token, the perplexity, and the share of tokens guessed right."""
        return metrics_of(self.sums)


@tasks.register("language", kind="language")
class Language:
    """Predict the next token.

    Args:
        balance: Weight of the load-balancing loss of layers with experts; 0.001 is Jamba's.
    """

    def __init__(self, *, balance: float = 0.001) -> None:
        if not 0 <= balance < math.inf:
            raise ConfigError(f"balance={balance}: needs a finite number of at least 0")
        self.balance = balance

    def for_data(self, data: Any) -> Self:
        """The same task: its metrics take nothing from the data."""
        return self

    def loss(self, model: nn.Module, batch: Text) -> Loss:
        """The negative log-likelihoods of all targets; with experts also their balance, and how they are used."""
        logits, router_logits = model(batch.tokens, cu_seqlens=batch.cu_seqlens, routers=True)
        total, count = nats(logits, batch.targets), (batch.targets != IGNORED).sum()
        if not router_logits:
            return Loss(total, count)
        n_experts = router_logits[0].shape[1]
        found = balance(router_logits, _top_k(model))
        # Shares of the most and the least used expert, 1 where all are used alike.
        use = {"busiest": found.use.max() * n_experts, "idlest": found.use.min() * n_experts}
        # What the record divides by the count again.
        parts = {name: value * count for name, value in {"balance": found.loss.detach(), **use}.items()}
        return Loss(total + self.balance * found.loss * count, count, {"nats": total.detach(), **parts})

    def evaluator(self) -> LanguageEvaluator:
        """A fresh evaluator."""
        return LanguageEvaluator()

    def score(self, metrics: dict[str, float]) -> float:
        """The validation loss."""
        return metrics["loss"]


def _top_k(model: nn.Module) -> int:
    """How many experts a token goes through, also of a model behind wrappers."""
    return next(module.top_k for module in model.modules() if hasattr(module, "router"))  # pyright: ignore[reportReturnType]
