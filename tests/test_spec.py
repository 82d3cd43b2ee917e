"""Runs written down: overrides, their errors, and the way to JSON and back."""

import subprocess
import sys
from typing import Literal

import pytest
from pydantic import ValidationError

from selectra.errors import ConfigError
from selectra.spec import Optim, Parallel, Run, Section, Spec, Train, override
from selectra.values import read_value

RUN = Run(model=Spec("m", depth=2), data=Spec("d"), task=Spec("t"), train=Train(epochs=3))


def test_spec_is_frozen_hashable_and_ordered():
    spec = Spec("m", b=1, a=[1, (2, "x")])
    assert spec.pairs == (("a", (1, (2, "x"))), ("b", 1))
    assert spec == Spec("m", a=(1, (2, "x")), b=1)
    assert hash(spec) == hash(spec.replace(b=1))
    with pytest.raises(AttributeError):
        spec.name = "n"  # type: ignore[misc]
    with pytest.raises(TypeError):
        spec.args["b"] = 2  # type: ignore[index]


def test_spec_holds_only_what_can_be_written_down():
    with pytest.raises(ConfigError, match=r"argument 'a' has the value .* of type object"):
        Spec("m", a=object())


def test_override_reads_sections_and_keeps_arguments():
    run = override(RUN, ["model.d_state=8", "train.steps=500", "optim.betas=0.8,0.95", "optim.clip=none", "name=x"])
    assert run.model == Spec("m", depth=2, d_state="8")
    assert (run.train.steps, run.train.epochs) == (500, None)
    assert (run.optim.betas, run.optim.clip, run.name) == ((0.8, 0.95), None, "x")
    assert RUN.train.epochs == 3


def test_of_some_numbers_one_is_read_from_text():
    assert read_value("3", Literal[1, 3], "crops") == 3
    assert (
        read_value("1", Literal["auto", 1] | None, "crops") == 1
        and read_value("auto", Literal["auto", 1], "x") == "auto"
    )
    assert read_value("1", Literal["1", 1], "x") == "1"
    with pytest.raises(ConfigError, match=r"crops is '2', which is no 1 \| 3"):
        read_value("2", Literal[1, 3], "crops")


def test_override_reaches_inner_specs():
    run = override(RUN, ["model=head", "model.backbone=m", "model.backbone.d_state=8", "model.other.x=1"])
    assert run.model == Spec("head", backbone=Spec("m", d_state="8"), other=Spec("", x="1"))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("modl.x=3", r"a run has no 'modl'.*Did you mean 'model'\?"),
        ("model", "not of the form key=value"),
        ("model.=3", "not of the form key=value"),
        ("train.stpes=3", r"no 'train.stpes'.*steps \(int | None\).*Did you mean 'steps'\?"),
        ("train.steps=many", r"'train.steps' is 'many', which is no int \| None"),
        ("train.steps=0", "greater than or equal to 1"),
        ("optim.schedule=cos", "no 'cosine' | 'constant'"),
        ("optim=3", "'optim' is a section"),
        ("model.depth.x=3", "'depth' is 2, which has no arguments"),
    ],
)
def test_override_errors(word, message):
    with pytest.raises(ConfigError, match=message):
        override(RUN, [word])


def test_steps_and_epochs_exclude_each_other():
    with pytest.raises(ConfigError, match="either 'steps' or 'epochs'"):
        override(RUN, ["train.steps=3", "train.epochs=4"])
    with pytest.raises(ValidationError, match="either 'steps' or 'epochs'"):
        Train()


def test_run_to_json_and_back():
    run = RUN.model_copy(update={"model": Spec("head", backbone=Spec("m", dims=(1, 2)), rate=0.5, flag=None)})
    assert Run.from_json(run.to_json()) == run
    assert Run.from_json('{"run": ' + run.to_json() + "}") == run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "x is not JSON"),
        ('{"model": "m", "data": "d"}', "x: task: Field required"),
        ('{"model": "m", "data": "d", "task": "t", "tain": {}}', "x: tain: Extra inputs"),
        ('{"model": 3, "data": "d", "task": "t"}', "x: model: .*got 3"),
    ],
)
def test_json_errors(text, message):
    with pytest.raises(ConfigError, match=message):
        Run.from_json(text, "x")


@pytest.mark.parametrize("section", [Optim, Train, Parallel, Run])
def test_every_field_is_documented(section: type[Section]):
    assert all(info.description for info in section.model_fields.values())


def imports_torch(modules: str) -> bool:
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode != 0


def test_no_torch():
    if imports_torch("selectra"):
        pytest.skip("the package itself imports torch")
    assert not imports_torch("selectra.spec, selectra.registry")
