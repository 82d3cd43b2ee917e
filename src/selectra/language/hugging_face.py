"""Language models of ours under the names of others: Hugging Face's configurations and keys, and mamba_ssm's.

A model says in `hugging_face` what its config.json would be and in a `Names` how its keys are called there; readers of
official configurations stand at the end of each model's file.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any, Literal, get_type_hints

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectra.errors import DataError
from selectra.language.model import HuggingFace, LanguageModel
from selectra.official import Official, Reader, read_dtype, reads, with_options_of


class OfficialLanguageModel(Official):
    """A causal language model of Hugging Face or mamba_ssm: token ids and attention mask in, logits out."""

    model: LanguageModel

    def forward(
        self, input_ids: Int[Tensor, "b l"], attention_mask: Int[Tensor, "b l"] | None = None
    ) -> tuple[Float[Tensor, "b l vocab"]]:
        """The logits; what they are at padding means nothing."""
        return (self.model(input_ids, mask=None if attention_mask is None else attention_mask.bool()),)


class Names:
    """Two names for every key, by pairs of templates of ours and theirs, tried in order.

    In a template "{}" stands for one part between dots, the same in both; one that ends in a dot holds for all keys
    that begin with it.
    """

    def __init__(self, *pairs: tuple[str, str]) -> None:
        self._there = [_rule(ours, theirs) for ours, theirs in pairs]
        self._here = [_rule(theirs, ours) for ours, theirs in pairs]

    def ours(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state under our keys; keys without a rule stay."""
        return {_renamed(key, self._here): value for key, value in state.items()}

    def theirs(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state under their keys."""
        return {_renamed(key, self._there): value for key, value in state.items()}


__all__ = [
    "SOURCES", "TOKENS", "HuggingFace", "Names", "OfficialLanguageModel", "common", "layout", "official", "own_layout",
]  # fmt: skip

Rule = tuple[re.Pattern[str], str]


def _rule(source: str, target: str) -> Rule:
    pattern = re.escape(source).replace(r"\{\}", r"([^.]+)")
    for number in range(target.count("{}")):
        target = target.replace("{}", rf"\{number + 1}", 1)
    return re.compile(pattern if source.endswith(".") else pattern + "$"), target


def _renamed(key: str, rules: list[Rule]) -> str:
    for pattern, target in rules:
        if pattern.match(key):
            return pattern.sub(target, key, count=1)
    return key


# The sources whose configurations say their "model_type", and those of ours that nobody else has.
SOURCES: dict[str, str] = {}


def layout(model_type: str, source: str) -> Callable[[type], type]:
    """Say that configurations of `model_type` are read as those of the official class `source`."""

    def register(model: type) -> type:
        assert model_type not in SOURCES
        SOURCES[model_type] = source
        return model

    return register


# What configurations say of the tokens that fill up, begin and end texts.
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def read_common(
    *,
    transformers_version: str | None = None,
    architectures: list[str] | None = None,
    output_hidden_states: Literal[False] = False,
    output_attentions: Literal[False] = False,
    return_dict: bool = True,
    dtype: str | torch.dtype | None = None,
    chunk_size_feed_forward: Literal[0] = 0,
    is_encoder_decoder: Literal[False] = False,
    problem_type: None = None,
    id2label: dict[Any, Any] | None = None,
    label2id: dict[Any, Any] | None = None,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    use_cache: bool = True,
    initializer_range: float = 0.02,
    _name_or_path: str = "",
    model_type: str = "",
) -> Official:
    """What every Hugging Face configuration holds. Apart from `dtype` nothing here changes a loaded model's logits:
    versions and names, what to return, token ids that generation knows, initial values, labels of classifiers.
    """
    raise NotImplementedError


def own_layout(model_type: str) -> Callable[[type], type]:
    """Keep a model that nobody else has in the same way: its constructor's arguments are the configuration.

    Its source is "selectra:Class"; a model tells its arguments in `hugging_face`.
    """

    def register(model: type) -> type:
        def reader(**options: Any) -> Official:
            own = {name: value for name, value in options.items() if name in arguments}
            return official(model(**own), dict, options)

        arguments = {name: p for name, p in inspect.signature(model).parameters.items() if name != "self"}
        shared = [p for name, p in inspect.signature(read_common).parameters.items() if name not in arguments]
        reader.__signature__ = inspect.Signature([*arguments.values(), *shared])  # pyright: ignore[reportFunctionMemberAccess]
        reader.__annotations__ = {**get_type_hints(read_common), **get_type_hints(model.__init__)}
        reader.__doc__ = model.__doc__
        reads(f"selectra:{model.__name__}")(reader)
        return layout(model_type, f"selectra:{model.__name__}")(model)

    return register


def common(reader: Reader) -> Reader:
    """Let a reader take what every Hugging Face configuration holds, in its `**options`."""
    return with_options_of(read_common)(reader)


def official(
    model: LanguageModel, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]], options: dict[str, Any]
) -> OfficialLanguageModel:
    """The model under official names, in the type that the configuration names."""

    def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return without_tied_copy(rename(state)) if model.tied else rename(state)

    model.special_tokens = {name: options[name] for name in TOKENS if name in options}
    found = OfficialLanguageModel(model, renamed)
    dtype = read_dtype(options.get("dtype"))
    return found if dtype is None else found.to(dtype)


def without_tied_copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without the second name of a matrix that is embedding and map to the vocabulary.

    Raises:
        DataError: They differ.
    """
    head, embedding = state.pop("lm_head.weight", None), state.get("embedding.weight")
    if head is None:
        return state
    if embedding is None:
        # A file that holds a shared tensor once may hold it under either name.
        return {**state, "embedding.weight": head}
    if head is not embedding and not (head.shape == embedding.shape and torch.equal(head, embedding)):
        raise DataError(
            f"the configuration ties the map to the vocabulary {tuple(head.shape)} to the embedding "
            f"{tuple(embedding.shape)}, and in the state they differ."
        )
    return state
