"""Official weights: a class of another repository by its name, configuration and state, as a module of ours.

A reader is a function whose keyword arguments are the official constructor's, under their official names: its signature
is the list of options, its annotations the values taken. It returns an `Official` around a model of ours. Readers of
whole models stand at the end of the model's file; those of single mixers stand here, since mixers know no registry.
"""

import contextlib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError, DataError
from selectra.layers.conv_stages import row_block_key
from selectra.mixers.einfft import EinFFT
from selectra.mixers.row_block import RowBlock
from selectra.mixers.s6 import S6, State
from selectra.spec import nearest
from selectra.values import read_value, require_finite


class Official(nn.Module):
    """A model of ours that is called as the official class is, and returns a tuple of what that returns.

    Args:
        model: Our model.
        rename: From official state keys to ours; by default they are the same.
    """

    def __init__(self, model: nn.Module, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict) -> None:
        super().__init__()
        self.model = model
        self.rename = rename

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The official outputs for the official inputs, both in their official order and layout."""
        y = self.model(*args, **kwargs)
        return y if isinstance(y, tuple) else (y,)


# Keys or problems that one message lists.
MOST_SHOWN = 8
Reader = Callable[..., Official]
readers: dict[str, Reader] = {}


def reads(source: str) -> Callable[[Reader], Reader]:
    """Register the reader of the official class `source`, "owner/repository:Class"."""

    def register(reader: Reader) -> Reader:
        assert source not in readers
        readers[source] = reader
        return reader

    return register


def with_options_of(other: Reader) -> Callable[[Reader], Reader]:
    """Let a reader take, in its `**options`, all options of another one that it does not name itself."""

    def extend(reader: Reader) -> Reader:
        signature = inspect.signature(reader)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in own}
        theirs = [p for p in inspect.signature(other).parameters.values() if p.name not in names]
        annotations = {name: hint for name, hint in reader.__annotations__.items() if name in (*names, "return")}
        reader.__annotations__ = {**other.__annotations__, **annotations}
        reader.__signature__ = signature.replace(parameters=[*own, *theirs])  # pyright: ignore[reportFunctionMemberAccess]
        return reader

    return extend


def from_official(
    source: str,
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    *,
    device: str | torch.device | None = None,
) -> Official:
    """Build the official class `source` from our parts, with its weights.

    The module is float64 where the state is, else float32, unless the official options name a type.

    Args:
        source: "owner/repository:Class", such as "state-spaces/mamba:Mamba".
        config: Keyword arguments of the official constructor.
        state_dict: Its state, under its keys.
        device: Where its weights are made, in their own type and nowhere else; for models all of whose tensors are in
            their state. Without one they are made as PyTorch makes modules, on the CPU in its default type at first.

    Returns:
        A module in evaluation mode that takes the official inputs in their official order and layout and returns the
        tuple of official outputs; our model is its `.model`.

    Raises:
        ConfigError: Unknown source; an option that is unknown, missing, or has a value that is not supported.
        DataError: State keys that are missing or not known; shapes or kinds of number that do not fit.
    """
    # Readers register when the models are imported.
    importlib.import_module("selectra.models")
    if source not in readers:
        raise ConfigError(f"'{source}' is not known; there are {', '.join(sorted(readers))}.{nearest(source, readers)}")
    options = checked_options(source, config)
    try:
        with contextlib.nullcontext() if device is None else torch.device("meta"):
            official = readers[source](**options)
    except ConfigError as error:
        # Our models name their own arguments.
        raise ConfigError(f"{source}: {error}") from error
    if "dtype" not in config or config["dtype"] is None:
        double = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in state_dict.values())
        official.to(torch.float64 if double else torch.float32)
    _load(source, official, state_dict, device)
    return official.eval()


def checked_options(source: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration read by the annotations of the source's reader.

    Raises:
        ConfigError: An option that is unknown, missing, or has a value that is not supported.
    """
    reader = readers[source]
    parameters = inspect.signature(reader).parameters
    hints = get_type_hints(reader)
    for name in config:
        if name not in parameters:
            raise ConfigError(
                f"{source} has no supported option '{name}'; it takes {', '.join(parameters)}."
                f"{nearest(str(name), parameters)}"
            )
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in config]
    if missing:
        raise ConfigError(f"{source} needs {', '.join(map(repr, missing))}; the configuration does not say.")
    read = {name: read_value(value, hints[name], f"{source}: option '{name}'") for name, value in config.items()}
    for name, value in read.items():
        require_finite(value, f"{source}: option '{name}'")
    return read


def _load(source: str, official: Official, state_dict: Mapping[str, Tensor], device: str | torch.device | None) -> None:
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise DataError(f"{source}: state '{key}' is {type(value).__name__}; it must be a tensor.")
    state = official.rename(dict(state_dict))
    ours = official.model.state_dict()
    missing, unknown = ours.keys() - state.keys(), state.keys() - ours.keys()
    problems = []
    if missing:
        problems.append(f"the state lacks {_some(missing)}")
    if unknown:
        problems.append(f"the state has {_some(unknown)}, which this configuration has no place for")
    for key in sorted(ours.keys() & state.keys()):
        got, expected = tuple(state[key].shape), tuple(ours[key].shape)
        if got != expected:
            problems.append(f"'{key}' has the shape {got} where the configuration gives {expected}")
        elif _kind(state[key]) != _kind(ours[key]):
            problems.append(f"'{key}' is {state[key].dtype} where the model has {ours[key].dtype}")
    if problems:
        more = f"; and {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
        raise DataError(f"{source}: {'; '.join(problems[:MOST_SHOWN])}{more}.")
    if device is not None:
        # Whatever has no place in a state would stay empty.
        assert dict(official.model.named_buffers()).keys() <= ours.keys()
        official.to_empty(device=device)
    official.model.load_state_dict(state)


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    """Floating, complex, or neither: copying a weight into another kind would lose a part of it."""
    return tensor.is_floating_point(), tensor.is_complex()


def _some(keys: set[str]) -> str:
    shown = ", ".join(f"'{key}'" for key in sorted(keys)[:MOST_SHOWN])
    return shown if len(keys) <= MOST_SHOWN else f"{shown} and {len(keys) - MOST_SHOWN} more"


class InferenceParams(Protocol):
    """What mamba_ssm's inference parameters hold of interest to one layer."""

    seqlen_offset: int
    key_value_memory_dict: dict[Any, tuple[Tensor, Tensor]]


class OfficialMamba(Official):
    """`mamba_ssm.Mamba`: whole sequences, prefill and decoding with its cache, and single steps."""

    model: S6

    def __init__(self, model: S6, layer_idx: int | None) -> None:
        super().__init__(model)
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: Float[Tensor, "b l d"], inference_params: InferenceParams | None = None
    ) -> tuple[Float[Tensor, "b l d"]]:
        """With `inference_params` a prefill where its offset is 0, else one step; either writes the layer's cache."""
        if inference_params is None:
            return (self.model(hidden_states),)
        conv_state, ssm_state = self._cache(inference_params, len(hidden_states))
        if inference_params.seqlen_offset > 0:
            return (self.step(hidden_states, conv_state, ssm_state)[0],)
        y, state = self.model.scan(hidden_states, self.model.init_state(len(hidden_states)))
        # The cache is memory, not part of the graph, as in the official code.
        conv_state.data.copy_(state.conv)
        ssm_state.data.copy_(state.ssm)
        return (y,)

    def step(
        self,
        hidden_states: Float[Tensor, "b 1 d"],
        conv_state: Float[Tensor, "b e k"],
        ssm_state: Float[Tensor, "b e n"],
    ) -> tuple[Float[Tensor, "b 1 d"], Float[Tensor, "b e k"], Float[Tensor, "b e n"]]:
        """One token; the states are written in place and returned."""
        if hidden_states.shape[1] != 1:
            raise ConfigError(f"hidden_states has {hidden_states.shape[1]} positions; a step takes 1.")
        return self.model.step_(hidden_states, State(conv_state, ssm_state)), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Float[Tensor, "b e k"], Float[Tensor, "b e n"]]:
        """Empty states; `max_seqlen` and further official keywords have no effect, a state has one size."""
        state = self.model.init_state(batch_size)
        return (state.conv, state.ssm) if dtype is None else (state.conv.to(dtype), state.ssm.to(dtype))

    def _cache(self, inference_params: InferenceParams, batch: int) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ConfigError("inference_params were given to a Mamba without layer_idx, the key of its cache.")
        memory = inference_params.key_value_memory_dict
        if self.layer_idx not in memory:
            state = self.model.init_state(batch)
            memory[self.layer_idx] = (state.conv, state.ssm)
        return memory[self.layer_idx]


@reads("state-spaces/mamba:Mamba")
def read_mamba(
    *,
    d_model: int,
    d_state: int = 16,
    d_conv: int = 4,
    expand: int | float = 2,
    dt_rank: int | Literal["auto"] = "auto",
    dt_min: float = 0.001,
    dt_max: float = 0.1,
    dt_init: Literal["random", "constant"] = "random",
    dt_scale: float = 1.0,
    dt_init_floor: float = 1e-4,
    conv_bias: bool = True,
    bias: bool = False,
    use_fast_path: bool = True,
    layer_idx: int | None = None,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> OfficialMamba:
    """Mamba's mixer. `use_fast_path` chooses among official kernels for the same function: here it has no effect."""
    chosen_device, chosen_dtype = read_device(device), read_dtype(dtype)
    model = S6(
        d_model,
        d_state,
        d_conv,
        expand,
        dt_rank,
        dt_min=dt_min,
        dt_max=dt_max,
        dt_init=dt_init,
        dt_scale=dt_scale,
        dt_init_floor=dt_init_floor,
        conv_bias=conv_bias,
        bias=bias,
    )
    return OfficialMamba(model, layer_idx).to(device=chosen_device, dtype=chosen_dtype)


class OfficialEinFFT(Official):
    """SiMBA's mixer, which is given the grid's height and width and makes no use of them."""

    def forward(self, x: Float[Tensor, "b l d"], H: int | None = None, W: int | None = None) -> tuple[Tensor]:
        return (self.model(x),)


@reads("badripatro/simba:EinFFT")
def read_einfft(*, dim: int) -> OfficialEinFFT:
    """SiMBA's spectral channel mixer."""
    return OfficialEinFFT(EinFFT(dim))


class OfficialRowBlock(Official):
    """SiMBA's and Samba's block on a sequence of tokens; the grid's sides come with it or with the configuration."""

    model: RowBlock

    def __init__(self, model: RowBlock, height: int | None, width: int | None) -> None:
        super().__init__(model, lambda state: {row_block_key(key): value for key, value in state.items()})
        self.height, self.width = height, width

    def forward(self, x: Float[Tensor, "b l d"], H: int | None = None, W: int | None = None) -> tuple[Tensor]:
        height, width = (self.height if H is None else H), (self.width if W is None else W)
        if height is None or width is None or height * width != x.shape[1]:
            raise ConfigError(f"H={height} and W={width}: x has {x.shape[1]} tokens, which must be H W")
        return (self.model(x.unflatten(1, (height, width))).flatten(1, 2),)


# As partial, class or text: "LayerNorm eps=1e-6".
NormLayer = Any


def norm_eps(norm_layer: NormLayer) -> float:
    """The eps of the norms that an official class takes as an argument.

    Raises:
        ConfigError: They are no layer norms.
    """
    if isinstance(norm_layer, str):
        found = re.fullmatch(r"LayerNorm(?:[ (]*eps ?= ?([0-9.e-]+)\)?)?", norm_layer)
        eps = None if found is None else float(found[1] or 1e-5)
    else:
        made = norm_layer(1) if callable(norm_layer) else None
        eps = made.eps if isinstance(made, nn.LayerNorm) else None
    if eps is None:
        raise ConfigError(f"option 'norm_layer' is {norm_layer!r}; it takes LayerNorm, such as 'LayerNorm eps=1e-6'")
    return eps


# Of mamba_ssm's mixer: what shapes it, and what only says how it starts or which kernel it takes.
SHAPING = ("d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias")
STARTING = ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor")


def mixer_options(option: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a whole model's option for its mixers says about their shape; how steps start has no effect on loaded ones.

    Raises:
        ConfigError: It has a name that is not supported.
    """
    for name in given or {}:
        if name not in (*SHAPING, *STARTING):
            raise ConfigError(
                f"option '{option}' has '{name}'; it takes {', '.join((*SHAPING, *STARTING))}."
                f"{nearest(name, (*SHAPING, *STARTING))}"
            )
    return {name: value for name, value in (given or {}).items() if name in SHAPING}


# Of the second direction's parameters, in Vim's fork of mamba_ssm and those made after it.
BACK = {"A_b_log": "A_log", "D_b": "D", "conv1d_b": "conv1d", "x_proj_b": "x_proj", "dt_proj_b": "dt_proj"}


def bidirectional_key(key: str) -> str:
    """Our key of a two-directional mixer's parameter, which may stand behind a prefix."""
    parts = key.split(".")
    for i, part in enumerate(parts):
        if part in BACK:
            return ".".join([*parts[:i], "back", BACK[part], *parts[i + 1 :]])
        if part in BACK.values():
            return ".".join([*parts[:i], "ahead", *parts[i:]])
    return key


def read_device(device: str | int | torch.device | None) -> torch.device | None:
    """A device of this machine."""
    if device is None:
        return None
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    # An AssertionError is torch's word for a build without that kind of device.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"option 'device' is '{device}', which cannot be used here: {reason}") from error
    return chosen


def read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating type, itself or its name, with or without "torch."."""
    if dtype is None:
        return None
    known = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ConfigError(f"option 'dtype' is '{dtype}'; it takes {', '.join(known)}.{nearest(name, known)}")
    return known[name]
