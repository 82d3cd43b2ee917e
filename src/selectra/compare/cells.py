"""One cell of a comparison: a whole run, and what a table calls it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from selectra.errors import ConfigError
from selectra.spec import Run

# What is stored as it is.
MORE = ("variates", "by_gradient", "group", "weight", "trial")


@dataclass(frozen=True)
class Cell:
    """A training to be done once.

    Args:
        run: Everything that the training needs.
        place: Cells are done in this order.
        label: What tables call it: data, look-back, horizon, model, seed, ...
        variates: Seed of the order in which the series stand; 0 is the file's.
        by_gradient: Whether it belongs on a GPU; what is solved or needs no training is done on a CPU.
        group: Cells that are decided on together, such as one model's trials of learning rates.
        weight: Places that it takes of those that a GPU has for trainings side by side.
        trial: Its number among its group's trials of settings, which see the validation part alone and may be pruned;
            None for a training that is scored on the test part.
    """

    run: Run
    place: int
    label: Mapping[str, Any] = field(hash=False)
    variates: int = 0
    by_gradient: bool = True
    group: str = ""
    weight: int = 1
    trial: int | None = None

    @property
    def key(self) -> str:
        """The same for the same training, whatever tables it stands in."""
        content = {"run": json.loads(self.run.model_copy(update={"name": ""}).to_json()), "v": self.variates}
        # Two trials may happen to have the same settings.
        text = json.dumps(content if self.trial is None else content | {"trial": self.trial})
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """For a line on a terminal."""
        return " ".join(str(value) for value in self.label.values())

    def to_json(self) -> str:
        """As text; `from_json` reads it back."""
        content = {"run": json.loads(self.run.to_json()), "place": self.place, "label": dict(self.label)}
        return json.dumps({**content, **{name: getattr(self, name) for name in MORE}})

    @classmethod
    def from_json(cls, text: str) -> "Cell":
        """What `to_json` wrote."""
        content = json.loads(text)
        run = Run.from_json(json.dumps(content["run"]), "a stored cell")
        label = MappingProxyType(content["label"])
        # A store of an earlier day has no trials of this kind.
        return cls(run, content["place"], label, **{name: content[name] for name in MORE if name in content})


def differences(base: Run, run: Run) -> dict[str, tuple[Any, Any]]:
    """What differs outside the model, by dotted name: the value in the base, and in the run."""
    found = {}
    before, now = (_flat(json.loads(each.to_json())) for each in (base, run))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name) and name != "name" and not name.startswith("model"):
            found[name] = (before.get(name), now.get(name))
    return found


def require_fair(base: Run, run: Run, declared: Mapping[str, str]) -> None:
    """Refuse a run that differs from the base in more than the model and what is declared with a reason.

    Raises:
        ConfigError: It does; the message names the setting and both values.
    """
    for name, (before, now) in differences(base, run).items():
        if name not in declared:
            raise ConfigError(
                f"'{run.name}' changes {name} from {before!r} to {now!r}, and only the model may differ"
                f"{' beside ' + ', '.join(declared) if declared else ''}; declare it with a reason, or leave it."
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.")
    return flat
