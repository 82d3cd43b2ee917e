"""What every language model is: an embedding, residual blocks around mixers, a norm and a map to the vocabulary."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError, DataError
from selectra.language.stream import Stream, fork, merge, overwrite_
from selectra.layers.norm import AddNorm, PreNorm
from selectra.mixers.sizes import require_sizes
from selectra.ops import checks
from selectra.ops.whole import require_whole


class Routed(NamedTuple):
    """Logits, and what the routers of layers with experts said."""

    logits: Float[Tensor, "b l vocab"]
    router_logits: tuple[Float[Tensor, "t e"], ...]
    """Of every layer with experts, for all tokens of the flattened batch."""


class HuggingFace(NamedTuple):
    """A model as Hugging Face would keep it."""

    config: dict[str, Any]
    """What config.json holds."""
    state: dict[str, Tensor]
    """The weights under Hugging Face's keys."""


class Block(PreNorm):
    """A mixer and a feed-forward layer, each behind a norm of the residual stream; names as in mamba_ssm's Block.

    Args:
        norm: Before the mixer.
        mixer: What mixes positions.
        norm2: Before the feed-forward layer.
        mlp: What mixes channels; a layer of experts also gives its router's logits.
    """

    def __init__(self, norm: AddNorm, mixer: nn.Module, norm2: AddNorm, mlp: nn.Module) -> None:
        super().__init__(norm, mixer)
        self.norm2, self.mlp = norm2, mlp

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, drop: nn.Module | None = None, **options: Any
    ) -> Any:
        """What the feed-forward layer makes of the stream, not yet added, and the stream.

        Args:
            drop: Acts on what the mixer adds to the stream.
            options: For the mixer.
        """
        x, residual = super().forward(x, residual, **options)
        x, residual = self.norm2(x if drop is None else drop(x), residual)
        return self.mlp(x), residual


class LanguageModel(nn.Module):
    """A causal language model on token ids.

    Args:
        vocab_size: Tokens.
        d_model: Width.
        blocks: `PreNorm` or `Block`, first to last.
        norm_f: The last norm.
        tied: Whether the embedding is the map to the vocabulary too.
        dropout: Rate on what every mixer and feed-forward layer adds to the stream.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        blocks: Iterable[PreNorm],
        norm_f: AddNorm,
        *,
        tied: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_sizes(vocab_size=vocab_size, d_model=d_model)
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout={dropout}: needs at least 0 and less than 1")
        self.vocab_size, self.d_model, self.tied = vocab_size, d_model, tied
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(blocks)
        if not len(self.layers):
            raise ConfigError("depth=0: needs at least 1")
        self.norm_f = norm_f
        self.lm_head = None if tied else nn.Linear(d_model, vocab_size, bias=False)
        self.drop = nn.Dropout(dropout)
        # What Hugging Face's configuration says of them, for those who generate; nothing here depends on it.
        self.special_tokens: dict[str, int | list[int] | None] = {}

    def forward(
        self,
        tokens: Int[Tensor, "b l"],
        *,
        mask: Bool[Tensor, "b l"] | None = None,
        cu_seqlens: Int32[Tensor, " borders"] | None = None,
        routers: bool = False,
    ) -> Any:
        """The logits (b, l, vocab) of every next token, or `Routed` with `routers`.

        Args:
            tokens: Token ids; where `mask` is False any id of the vocabulary may stand.
            mask: True where a token is present; padding on the left and on the right. Logits there mean nothing.
            cu_seqlens: Borders of packed sequences, with b = 1: nothing crosses them.
            routers: Also give what routers of layers with experts said; `selectra.layers.moe.balance` makes a loss of
                it.

        Raises:
            DataError: A token id is not in the vocabulary.
            ConfigError: Shapes do not fit.
        """
        found: list[Tensor] = []
        mixers = self.mixers()
        options: dict[str, Any] = {"mask": mask, "cu_seqlens": cu_seqlens}
        embedded = self._embedded(tokens, mask, cu_seqlens)
        x = self._through(embedded, lambda i, x: mixers[i](x, **options), found, options)
        logits = self._logits(x)
        return Routed(logits, tuple(found)) if routers else logits

    def blocks(self) -> list[nn.Module]:
        """What is sharded and checkpointed as one."""
        return list(self.layers)

    def hugging_face(self) -> HuggingFace:
        """Configuration and weights for a folder in Hugging Face's layout; every model says how."""
        raise ConfigError(f"{type(self).__name__} has no layout on disk.")

    def mixers(self) -> list[Any]:
        """The modules that have a state, in the order of `Stream.layers`."""
        return [block.mixer for block in self.layers]

    def init_state(self, batch: int, capacity: int = 0) -> Stream:
        """The state before the first token.

        Args:
            batch: Rows.
            capacity: For how many tokens mixers that remember all of them make room at once. `scan` makes more when it
                has to; `step_` does not, and keeps to the memory that there is.
        """
        layers = [
            mixer.init_state(batch, capacity) if getattr(mixer, "remembers_all", False) else mixer.init_state(batch)
            for mixer in self.mixers()
        ]
        return Stream(torch.zeros(batch, dtype=torch.int64, device=self.embedding.weight.device), tuple(layers))

    def scan(
        self, tokens: Int[Tensor, "b l"], state: Stream, *, mask: Bool[Tensor, "b l"] | None = None
    ) -> tuple[Float[Tensor, "b l vocab"], Stream]:
        """The logits of the next chunk, of any length, and the state to continue from; gradients flow through it.

        With `mask` each row takes its present tokens alone, wherever padding stands, and goes on from them next time.
        """
        require_whole("a language model's state")
        if mask is None:
            return self._scan(tokens, state, None)
        self._require(tokens, mask, None)
        # Present tokens to the right: mixers with a short memory must not see padding between two tokens.
        order = mask.to(torch.int8).argsort(dim=1, stable=True)
        back = order.argsort(dim=1)
        counts = mask.sum(1)
        if bool(((state.seen == 0) | (counts == tokens.shape[1])).all()):
            logits, after = self._scan(tokens.gather(1, order), state, mask.gather(1, order))
        else:
            logits, after = self._scan_by_count(tokens.gather(1, order), state, counts)
        return logits.gather(1, back[..., None].expand_as(logits)), after

    @torch.no_grad()
    def step_(
        self,
        tokens: Int[Tensor, "b l"],
        state: Stream,
        *,
        mask: Bool[Tensor, "b l"] | None = None,
        n_logits: int | None = None,
    ) -> Float[Tensor, "b n vocab"]:
        """Like `scan`, usually of one token, but writes into the state's tensors; without gradient.

        Args:
            tokens: The next tokens.
            state: Where to continue from; it is overwritten.
            mask: As in `scan`.
            n_logits: Of how many last positions the logits are wanted; None for all.

        Raises:
            ConfigError: The state has no room for the tokens.
        """
        require_whole("a language model's state")
        if mask is not None:
            logits, after = self.scan(tokens, state, mask=mask)
            overwrite_(state, after)
            return logits if n_logits is None else logits[:, -n_logits:]
        x = self._stepped(self._embedded(tokens, None, None), state)
        state.seen.add_(tokens.shape[1])
        return self._logits(x if n_logits is None else x[:, -n_logits:])

    def _scan(self, tokens: Tensor, state: Stream, mask: Tensor | None) -> tuple[Tensor, Stream]:
        mixers, after = self.mixers(), list(state.layers)
        require_rows(tokens, state)

        def mix(i: int, x: Tensor) -> Tensor:
            y, after[i] = mixers[i].scan(x, state.layers[i], mask=mask)
            return y

        x = self._through(self._embedded(tokens, mask, None), mix, [])
        seen = state.seen + (tokens.shape[1] if mask is None else mask.sum(1))
        return self._logits(x), Stream(seen, tuple(after))

    def _scan_by_count(self, tokens: Tensor, state: Stream, counts: Tensor) -> tuple[Tensor, Stream]:
        """Rows with equally many present tokens together: then there is no padding."""
        parts: list[tuple[Tensor, Stream]] = []
        logits = self.embedding.weight.new_zeros(*tokens.shape, self.vocab_size)
        for n in counts.unique().tolist():
            rows = (counts == n).nonzero()[:, 0]
            part = fork(state, rows)
            if n:
                found, part = self._scan(tokens[rows, -n:], part, None)
                places = torch.arange(tokens.shape[1] - n, tokens.shape[1], device=rows.device)
                logits = logits.index_put((rows[:, None], places[None]), found.to(logits.dtype))
            parts.append((rows, part))
        return logits, merge(parts, state)

    def _stepped(self, x: Tensor, state: Stream) -> Tensor:
        """The last norm's output for the next positions; writes the layers' states."""
        mixers = self.mixers()
        require_rows(x, state)
        return self._through(x, lambda i, x: mixers[i].step_(x, state.layers[i]), [])

    def _through(
        self,
        x: Tensor,
        mix: Callable[[int, Tensor], Tensor],
        routers: list[Tensor],
        options: dict[str, Any] | None = None,
    ) -> Tensor:
        """Embedded tokens through all blocks and the last norm; `mix(i, x)` runs mixer i.

        With `options`, which `mix` passes to mixers, blocks are called themselves: only then can they be computed again
        during backward, and spread over processes.
        """
        residual = None
        for i, block in enumerate(self.layers):
            if options is not None:
                more = {"drop": self.drop} if isinstance(block, Block) else {}
                y, residual = block(x, residual, **options, **more)
                if isinstance(y, tuple):
                    y, said = y
                    routers.append(said)
                x = self.drop(y)
                continue
            x, residual = block.norm(x, residual)  # pyright: ignore[reportCallIssue]
            x = self.drop(mix(i, x))
            if isinstance(block, Block):
                x, residual = block.norm2(x, residual)
                y = block.mlp(x)
                if isinstance(y, tuple):
                    y, said = y
                    routers.append(said)
                x = self.drop(y)
        return self.norm_f(x, residual)[0]

    def _embedded(self, tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        self._require(tokens, mask, cu_seqlens)
        return self.embedding(tokens)

    def _logits(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l vocab"]:
        return F.linear(x, self.embedding.weight) if self.lm_head is None else self.lm_head(x)

    def _require(self, tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_complex():
            raise DataError(f"tokens are {tokens.dtype} {tuple(tokens.shape)}; they must be whole numbers, (b, l).")
        checks.count_states(tokens, mask, cu_seqlens)
        # On a GPU the host would have to wait; there the embedding's own check stops the program. A subclass, such as a
        # FakeTensor, may have no values.
        if type(tokens) is Tensor and tokens.is_cpu and tokens.numel() and not torch.compiler.is_compiling():
            require_in_vocabulary(int(tokens.min()), int(tokens.max()), self.vocab_size)


def require_in_vocabulary(least: int, most: int, vocab_size: int) -> None:
    """Raise unless token ids from `least` to `most` are in the vocabulary.

    Raises:
        DataError: They are not.
    """
    if least < 0 or most >= vocab_size:
        raise DataError(
            f"token ids run from {least} to {most}; the model's vocabulary has ids from 0 to {vocab_size - 1}. "
            "Is the tokenizer that of the model?"
        )


def require_rows(x: Tensor, state: Stream) -> None:
    """Raise unless there is a row of state for every row of x.

    Raises:
        ConfigError: There is not.
    """
    if len(x) != len(state.seen):
        raise ConfigError(f"there are {len(x)} rows of tokens and {len(state.seen)} of state; they must be as many.")


@torch.no_grad()
def start_weights(model: LanguageModel, *, std: float = 0.02, ends: tuple[str, ...] = (), maps: bool = True) -> None:
    """GPT-2's start: normal weights, and maps that end a residual branch smaller with the depth.

    Args:
        model: Whose weights.
        std: Standard deviation.
        ends: Last names of maps that end a branch, such as "o_proj".
        maps: Whether linear maps are drawn too, not only embeddings.
    """
    nn.init.normal_(model.embedding.weight, std=std)
    branches = sum(2 if isinstance(block, Block) else 1 for block in model.layers)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        last = name.rpartition(".")[2] in ends
        if maps:
            nn.init.normal_(module.weight, std=std * (branches**-0.5 if last else 1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif last:
            module.weight.mul_(branches**-0.5)
