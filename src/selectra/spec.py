"""A run written down: which model, data and task, with which settings. Frozen, hashable, and readable as JSON.

A `Spec` names a registered thing and the arguments that the run gives it; `selectra.registry` fills in the rest.
A `Run` is everything that a training needs. `override` changes a run from the command line's `key=value` words.
"""

import difflib
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, core_schema

from selectra.errors import ConfigError
from selectra.values import describe_problem, first_problem, read_value, type_name


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known name that looks most like `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


@dataclass(frozen=True, init=False, repr=False)
class Spec:
    """A registered name and its arguments: `Spec("tsm2_base", d_state=8)`; a value may itself be a Spec.

    A Spec without a name changes arguments of the Spec that stands in the same place in a size or a recipe.
    """

    name: str
    pairs: tuple[tuple[str, Any], ...]

    def __init__(self, name: str, /, **args: Any) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "pairs", tuple(sorted((key, _freeze(key, value)) for key, value in args.items())))

    @property
    def args(self) -> Mapping[str, Any]:
        """The arguments, read-only."""
        return types.MappingProxyType(dict(self.pairs))

    def replace(self, **args: Any) -> "Spec":
        """The same Spec with some arguments changed."""
        return Spec(self.name, **{**self.args, **args})

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists; `from_json` reads them back."""
        return {"name": self.name, "args": {key: _plain(value) for key, value in self.pairs}}

    @classmethod
    def from_json(cls, value: Any) -> "Spec":
        """Read a Spec from itself, from a bare name, or from what `to_json` wrote."""
        if isinstance(value, Spec):
            return value
        if isinstance(value, str):
            return cls(value)
        if not _is_spec_json(value):
            raise ValueError(f"expected a name, or an object with 'name' and 'args', and got {value!r}")
        return cls(value["name"], **value["args"])

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.from_json, serialization=core_schema.plain_serializer_function_ser_schema(cls.to_json)
        )

    def __repr__(self) -> str:
        return f"Spec({', '.join([repr(self.name), *(f'{key}={value!r}' for key, value in self.pairs)])})"


def _is_spec_json(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"name", "args"} and isinstance(value["args"], dict)


def _freeze(key: str, value: Any) -> Any:
    """Lists become tuples, stored Specs become Specs; anything that cannot be written down is refused."""
    if _is_spec_json(value):
        return Spec.from_json(value)
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(key, item) for item in value)
    if value is None or isinstance(value, (bool, int, float, str, Spec)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise ConfigError(
        f"argument '{key}' has the value {value!r} of type {type(value).__name__}; "
        "a Spec holds numbers, text, booleans, None, tuples of these, and other Specs."
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_json()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


class Section(BaseModel):
    """A frozen part of a run; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Optim(Section):
    """The optimizer (AdamW) and its learning rate over time."""

    lr: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Highest learning rate, reached after the warm-up."""
    weight_decay: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    """Decoupled weight decay; norms, biases and the parameters that ask for it are left out."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: down to zero along a cosine at the last step, or unchanged."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps in which the learning rate rises linearly to `lr`."""
    warmup_share: float | None = Field(default=None, ge=0, lt=1)
    """Share of all steps in which it does so, in place of `warmup_steps`: 20 of 300 passes are 1/15 of any data."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient over all parameters; None leaves gradients as they are."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of a stage, or of a block where all have one resolution, over that of the next: the head has `lr`,
    what is nearer to the image less."""

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps and self.warmup_share is not None:
            raise ValueError("give either 'warmup_steps' or 'warmup_share', and not both")
        return self


class Train(Section):
    """How long, in what pieces, and what is kept."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Either this or `epochs` is given."""
    epochs: Positive | None = None
    """Passes over the training windows; turned into steps when the data is known."""
    batch_size: int = Field(default=32, ge=1)
    """Windows, images or sequences in one forward pass, over all processes together."""
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients are added before one optimizer step."""
    eval_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between two evaluations on the validation split; None is once a pass."""
    save_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between two checkpoints; None is at every evaluation."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints that are kept, the latest ones."""
    patience: int | None = Field(default=None, ge=1)
    """Evaluations in a row without improvement after which training stops; None never stops early."""
    seed: int = Field(default=0, ge=0)
    """Seed of the weights, of the order of the data and of every random draw."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads for PyTorch; None leaves its own choice."""
    workers: int = Field(default=0, ge=0)
    """Processes that prepare batches; 0 prepares them in the training process."""
    load_timeout: Positive = 300.0
    """Seconds that those processes may take for a batch that is waited for; then training ends with an error."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", ...; "auto" is a CUDA device where there is one."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """What products are rounded to (autocast); weights stay float32, and float16 scales the loss."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the running mean of the weights, which is then what is measured and kept; it rises to this value in the
    first steps, as (1 + step) / (10 + step). None measures and keeps the weights themselves."""
    pretrained: str | None = None
    """A file of weights to start from, `.safetensors` or `.pth`; positions are resized, and a head for other classes
    starts afresh."""
    freeze: Annotated[int, Field(ge=0)] | Literal["all"] = 0
    """How many stages, or blocks where all have one resolution, are left as they are, what is before them too; "all"
    trains the head alone."""
    channels_last: bool = False
    """Keep convolutions' weights, and so images between them, channels last in memory: faster on a GPU."""
    recompute: bool = False
    """Do not store what is inside a block for the backward pass, and compute it again: less memory, more time."""
    compile: bool = False
    """Let torch.compile make one program of the model."""
    deterministic: bool = False
    """Take only operations that give the same bits every time, also on a GPU, and refuse what has none: a training
    that was interrupted then equals the undisturbed one bit for bit. On a CPU it does so without."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either 'steps' or 'epochs', and not both")
        return self


class Parallel(Section):
    """How several processes, started by torchrun, share the work."""

    kind: Literal["auto", "none", "ddp", "fsdp2", "length"] = "auto"
    """"ddp" is torch's DistributedDataParallel; "fsdp2" is fully_shard, where each process holds a part of weights,
    gradients and the optimizer's state; "length" splits every sequence of a language model's batches along its length;
    "auto" is "ddp" where torchrun started several processes."""
    in_parts: bool = False
    """With "fsdp2", make each weight in the process that holds it, rather than all of them in each first: for models
    that fit no single device. Weights then start differently with the number of processes."""
    gather: Literal["float32", "bfloat16"] = "float32"
    """With "fsdp2", the type in which weights are gathered for a block. "bfloat16", which goes with that precision,
    halves the bytes that are exchanged and held; every weight is rounded, gradients are still summed in float32."""
    timeout: Positive = 600.0
    """Seconds after which a process that waits for the others gives up."""


class Run(Section):
    """One training, written down completely."""

    model: Spec
    """The model and the arguments that the run gives it."""
    data: Spec
    """The data set and its arguments; its facts (lengths, counts) reach the model by themselves."""
    task: Spec
    """The loss and the metrics."""
    optim: Optim = Optim()
    """The optimizer."""
    train: Train = Train(epochs=10)
    """Length, batches, evaluation, checkpoints."""
    parallel: Parallel = Parallel()
    """Several processes."""
    name: str = "run"
    """A name for tables and folders."""

    def to_json(self) -> str:
        """The run as text; `from_json` reads it back."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str, where: str = "the run") -> "Run":
        """Read a run from its own JSON, or from a `run.json`, which holds it under "run".

        Raises:
            ConfigError: The text is no JSON, or a field is missing, unknown or mistyped.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where} is not JSON: {error}.") from error
        if isinstance(content, dict) and "run" in content:
            content = content["run"]
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ConfigError(f"{where}: {describe_problem(error)}") from error


def override(run: Run, words: Sequence[str]) -> Run:
    """Change a run by `key=value` words with dotted keys, such as `model.d_state=8` and `train.steps=500`.

    Values of sections are read here; arguments of a Spec are kept as text until the registry, which knows their
    annotations, reads them. `model=NAME` takes another model and forgets the former one's arguments.

    Raises:
        ConfigError: A word without "=", an unknown section or field, a value that does not fit.
    """
    given = {word.partition("=")[0] for word in words}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"'{word}' is not of the form key=value, such as model.d_state=8 or train.steps=500.")
        run = _override_one(run, key, value, given)
    return run


# Setting the one replaces the other, which a recipe may have set.
_REPLACES = {"train.steps": "epochs", "train.epochs": "steps"}


def _override_one(run: Run, key: str, value: str, given: set[str]) -> Run:
    section_name, _, rest = key.partition(".")
    sections = list(Run.model_fields)
    if section_name not in sections:
        raise ConfigError(f"a run has no '{section_name}'; it has {sections}.{nearest(section_name, sections)}")
    section = getattr(run, section_name)
    if isinstance(section, Spec):
        changed: Any = _override_spec(section, rest.split("."), value, key) if rest else Spec(value)
    elif isinstance(section, Section):
        if not rest:
            fields = list(type(section).model_fields)
            raise ConfigError(f"'{key}' is a section; set one of its fields, {section_name}.<name>, from {fields}.")
        clear = {_REPLACES[key]: None} if key in _REPLACES and f"train.{_REPLACES[key]}" not in given else {}
        changed = _override_section(section, rest, value, key, clear)
    else:
        changed = value
    return run.model_copy(update={section_name: changed})


def _override_section(section: Section, name: str, value: str, key: str, clear: dict[str, None]) -> Section:
    fields = type(section).model_fields
    if name not in fields:
        known = [f"{field} ({type_name(info.annotation)})" for field, info in fields.items()]
        raise ConfigError(f"there is no '{key}'; this section has {', '.join(known)}.{nearest(name, fields)}")
    hint = Annotated[fields[name].annotation, *fields[name].metadata] if fields[name].metadata else None
    read = read_value(value, hint or fields[name].annotation, f"'{key}'")
    try:
        return type(section).model_validate({**dict(section), **clear, name: read})
    except ValidationError as error:
        raise ConfigError(f"'{key}': {first_problem(error)}") from error


def _override_spec(spec: Spec, names: list[str], value: str, key: str) -> Spec:
    first, *rest = names
    if not rest:
        return spec.replace(**{first: value})
    inner = spec.args.get(first, Spec(""))
    if isinstance(inner, str):
        inner = Spec(inner)
    if not isinstance(inner, Spec):
        raise ConfigError(f"'{key}': '{first}' is {inner!r}, which has no arguments of its own.")
    return spec.replace(**{first: _override_spec(inner, rest, value, key)})
