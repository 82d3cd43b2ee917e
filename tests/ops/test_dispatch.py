"""Choosing a backend: order, refusal, force, environment."""

import copy
import inspect
import logging
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from selectra.errors import BackendError
from selectra.ops import dispatch, selective_scan
from selectra.ops.dispatch import Backend, Op


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Op[[int], int, str]:
    monkeypatch.setattr(dispatch, "OPS", {})

    def prepare(x: int) -> int:
        """Doubles."""
        return 2 * x

    return Op(
        "toy",
        prepare,
        [
            Backend("fast", lambda call: "the number is odd" if call % 4 else None, lambda call: f"fast {call}"),
            Backend("slow", lambda call: None, lambda call: f"slow {call}"),
            Backend("truth", lambda call: None, lambda call: f"truth {call}", only_when_asked=True),
        ],
    )


def test_the_first_that_does_not_refuse_runs(op: Op[[int], int, str]) -> None:
    assert op(2) == "fast 4"
    assert op(3) == "slow 6"
    assert op.backend_for(3) == "slow"
    assert op.explain(3) == {"fast": "the number is odd", "slow": "ok", "truth": "ok"}
    assert op.__doc__ == "Doubles."


def test_what_was_asked_for_never_falls_back(op: Op[[int], int, str]) -> None:
    with op.using("truth"):
        assert op(2) == "truth 4"
    with op.using("fast"), pytest.raises(BackendError, match=r"'fast' was asked for .* the number is odd"):
        op(3)
    assert op(3) == "slow 6"


def test_unknown_names_are_said_with_the_nearest(op: Op[[int], int, str]) -> None:
    with pytest.raises(BackendError, match=r"'fats' is no backend of toy.*Did you mean 'fast'\?"), op.using("fats"):
        pass


def test_an_exception_in_refuse_is_a_bug_not_a_refusal(op: Op[[int], int, str]) -> None:
    op.backends["fast"] = Backend("fast", lambda call: str(1 / 0), lambda call: "")
    with pytest.raises(ZeroDivisionError):
        op(2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("selective_scan=referense", r"Did you mean 'reference'\?"),
        ("selective_scam=reference", r"Did you mean 'selective_scan'\?"),
        ("reference", "not of the form operator=backend"),
    ],
)
def test_a_wrong_environment_is_said_at_the_first_call(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = dispatch._Environment()
    environment.read(text)
    monkeypatch.setattr(dispatch, "_environment", environment)
    u = torch.zeros(1, 1, 1)
    with pytest.raises(BackendError, match=message):
        selective_scan(u, u, -torch.ones(1, 1), u, u)


def test_the_environment_chooses_and_is_announced() -> None:
    program = (
        "import torch; from selectra.ops import selective_scan; u = torch.zeros(1, 1, 1); "
        "print(selective_scan.backend_for(u, u, -u[0], u, u))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "SELECTRA_KERNEL": "selective_scan=reference"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "reference"
    assert "SELECTRA_KERNEL is set" in done.stderr


def test_a_slow_path_is_said_once_and_not_when_asked_for(
    op: Op[[int], int, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.WARNING, "selectra"):
        with op.using("slow"):
            dispatch.say_slow_path("toy", "slow", 6, "cpu")
        assert not caplog.messages
        dispatch.say_slow_path("toy", "slow", 6, "cpu")
        dispatch.say_slow_path("toy", "slow", 6, "cpu")
    assert caplog.messages == ["toy runs on its slow backend, which is slow on cpu (fast: the number is odd)."]


def test_overlapping_blocks_of_two_threads_leave_nothing_behind(op: Op[[int], int, str]) -> None:
    first, second = op.using("truth"), op.using("slow")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert op(2) == "slow 4"
    second.__exit__(None, None, None)
    assert op(2) == "fast 4" and op.asked is None


def test_a_copy_is_the_same_operator_and_its_signature_is_honest() -> None:
    assert copy.deepcopy(selective_scan) is selective_scan
    assert pickle.loads(pickle.dumps(selective_scan)) is selective_scan
    signature = inspect.signature(selective_scan)
    assert signature.return_annotation == Tensor | tuple[Tensor, Tensor]
    assert "return_final_state" in signature.parameters


def test_a_choice_made_at_compile_time_is_not_called_a_slow_path(
    op: Op[[int], int, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_said", set())
    dispatch.say_slow_path("toy", "slow", 4, "cpu")
    assert not caplog.messages
