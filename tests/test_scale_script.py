"""`results/scale_gpu.py`: what fails in one of its processes is in the record."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.train import processes as _processes  # noqa: F401  (processes are copies of one that has loaded the library)

RESULTS = Path(__file__).parents[1] / "results"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, with processes that begin at once."""
    monkeypatch.syspath_prepend(str(RESULTS))
    module = importlib.import_module("scale_gpu")
    start: Any = module.start_processes
    monkeypatch.setattr(module, "start_processes", lambda *args, **_: start(*args, start_method="forkserver"))
    return module


def test_the_record_has_what_every_process_raised_the_first_one_first(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Process 0 alone looks for the model while the other waits, which sees but a closed connection."""
    script.main(out=tmp_path, device="cpu", tiny=True, part=["tsm2_bse"])
    (path,) = tmp_path.glob("scale_cpu_tiny_*.json")
    problem = json.loads(path.read_text())["problem of tsm2_bse"]
    first = problem["processes"][0]
    assert first["process"] == 0 and first["seconds later"] == 0
    assert "ConfigError: there is no model 'tsm2_bse'" in first["traceback"]
    assert [each["process"] for each in problem["processes"]] in ([0], [0, 1])
    assert problem["launcher"].startswith("-- Process ")
    said = capsys.readouterr().out
    assert "process 0, 0.000 s after the first:" in said and "ConfigError: there is no model 'tsm2_bse'" in said
