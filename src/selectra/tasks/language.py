"""Language modelling: cross-entropy of the next token, in nats."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.layers.moe import Balance, Routing, routing_of
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


@dataclass(frozen=True, kw_only=True)
class BalancedLoss(Loss):
    """Negative log-likelihoods, and the balance of experts for each of them: that of this process's share by itself.

    `shared` has the balance over all processes' tokens.

    Args:
        nats: Sum of negative log-likelihoods.
        routing: What routers chose.
        top_k: Choices of a token.
        weight: Of the balance.
    """

    nats: Float[Tensor, ""]
    routing: Routing
    top_k: int
    weight: float

    @staticmethod
    def of(nats: Tensor, count: Tensor, routing: Routing, top_k: int, weight: float) -> "BalancedLoss":
        """The loss of so many targets."""
        found = routing.balance(top_k)
        return BalancedLoss(
            nats + weight * found.loss * count, count, _balance_parts(nats, found, count),
            nats=nats, routing=routing, top_k=top_k, weight=weight,
        )  # fmt: skip

    def shared(self, total: Callable[[Tensor], Tensor]) -> Loss:
        hits, probabilities, rows = self.routing
        own = torch.cat([hits, probabilities.detach(), torch.stack([rows, self.count.to(rows.dtype)])]).double()
        sums = total(own)
        if sums is own:
            # Alone.
            return self
        hits, all_probabilities, (rows, count) = sums.split([len(hits), len(hits), 2])
        found = Routing(hits, all_probabilities, rows).balance(self.top_k)
        # The balance is linear in probabilities: this process's part of it is what its own tokens' make.
        part = Routing(hits, probabilities.double(), rows).balance(self.top_k).loss
        balanced = (self.weight * part * count).to(self.nats.dtype)
        return Loss(self.nats + balanced, self.count, _balance_parts(self.nats, found, self.count))

    def nothing(self) -> "BalancedLoss":
        none = Routing(*(each * 0 for each in self.routing))
        return BalancedLoss.of(self.nats * 0, self.count * 0, none, self.top_k, self.weight)


def _balance_parts(nats: Tensor, found: Balance, count: Tensor) -> dict[str, Tensor]:
    """For the record, which divides by the count again."""
    n_experts = len(found.use)
    # Shares of the most and the least used expert, 1 where all are used alike.
    use = {"busiest": found.use.max() * n_experts, "idlest": found.use.min() * n_experts}
    parts = {name: value * count for name, value in {"balance": found.loss.detach(), **use}.items()}
    return {"nats": nats.detach(), **parts}


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
        top_k = _top_k(model)
        return BalancedLoss.of(total, count, routing_of(router_logits, top_k), top_k, self.balance)

    def evaluator(self) -> LanguageEvaluator:
        """A fresh evaluator."""
        return LanguageEvaluator()

    def score(self, metrics: dict[str, float]) -> float:
        """The validation loss."""
        return metrics["loss"]


def _top_k(model: nn.Module) -> int:
    """How many experts a token goes through, also of a model behind wrappers."""
    return next(module.top_k for module in model.modules() if hasattr(module, "router"))  # pyright: ignore[reportReturnType]
