"""Every command, and every error message that a user may see."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from selectra.cli import FORECAST_MODELS, main
from selectra.data.sources import PUBLIC, PublicFile
from tests.data.server import serving, whole

SHORT = ["model=linear", "data.seq_len=24", "data.horizon=6"]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """Two series of 400 hours."""
    hours = pd.date_range("2024-01-01", periods=400, freq="h")
    rows = np.arange(400)
    noise = np.random.RandomState(0).randn(2, 400) * 0.1
    values = {"a": np.sin(rows / 4) + noise[0], "b": np.cos(rows / 9) + noise[1]}
    pd.DataFrame({"date": hours, **values}).to_csv(tmp_path / "two.csv", index=False)
    return tmp_path / "two.csv"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):
    """Run a command; its exit code, output and error output."""

    def run(*words: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


def test_train_eval_and_again(call, csv, tmp_path):
    out = tmp_path / "out"
    words = ["model=dlinear", *SHORT[1:], f"data.path={csv}", "train.steps=4", "train.threads=1"]
    code, text, _ = call("train", "tsm2_weather", *words, "--out", out)
    assert code == 0
    assert f"selectra eval {out}" in text
    assert "step 4/4" in text
    run = json.loads((out / "run.json").read_text())
    assert run["run"]["train"]["steps"] == 4
    assert run["resolved"]["model"]["horizon"] == {"value": 6, "origin": "data"}
    code, text, _ = call("eval", out)
    assert code == 0
    stored = json.loads((out / "test.json").read_text())
    assert f"{stored['metrics']['mse']:.6f}" in text
    for size in (1, 7):
        call("eval", out, "--batch-size", size)
        assert json.loads((out / "test.json").read_text())["metrics"] == pytest.approx(stored["metrics"], abs=1e-6)
    # The same run once more, from its run.json: in place it is finished, elsewhere it gives the same.
    assert call("train", out / "run.json")[0] == 0
    call("train", out / "run.json", "--out", tmp_path / "again")
    call("eval", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "test.json").read_text())["metrics"] == stored["metrics"]


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_stop_prints_the_command_that_goes_on(call, csv, tmp_path, monkeypatch, number, expected):
    """By hand it is no success; by a system that takes the machine back everything went as it should."""
    from selectra.models import DLinear

    out, forward = tmp_path / "out", DLinear.forward
    words = ["model=dlinear", *SHORT[1:], f"data.path={csv}", "train.steps=4", "train.threads=1"]
    with monkeypatch.context() as patch:
        patch.setattr(DLinear, "forward", lambda *a, **k: (os.kill(os.getpid(), number), forward(*a, **k))[1])
        code, _, text = call("train", "tsm2_weather", *words, "--out", out)
    assert code == expected
    command = text.partition("go on with: selectra ")[2].split()
    assert command == ["train", str(out / "run.json")]
    code, text, _ = call(*command)
    assert code == 0
    assert re.search(r"Done after 4 steps, \d+ s without evaluations", text)


def test_closed_form_model_by_its_name(call, csv, tmp_path):
    out = tmp_path / "out"
    code, text, _ = call("train", "linear", *SHORT[1:], f"data.path={csv}", "--out", out)
    assert code == 0
    assert "ended by: solved" in text


def test_show_builds_nothing_and_tells_origins(call):
    code, text, _ = call("show", "tsm2_weather", "model.d_state=8", "optim.lr=0.002")
    assert code == 0
    rows = {cells[0]: cells[1:] for line in text.splitlines() if len(cells := line.replace("│", " ").split()) > 2}
    assert rows["model.d_state"] == ["8", "run"]
    assert rows["model.horizon"] == ["24", "data"]
    assert rows["model.n_series"][-1] == "data"
    assert rows["model.d_conv"][-1] == "default"
    assert rows["optim.lr"] == ["0.002", "run"]
    assert call("show", "tsm2_smoke")[0] == 0


def test_show_does_not_tell_a_default_for_what_the_data_say(call):
    def shown(*words):
        code, text, _ = call("show", *words)
        assert code == 0
        return {cells[0]: cells[1:] for line in text.splitlines() if len(cells := line.replace("│", " ").split()) > 2}

    unread = ["read", "from", "the", "data", "data"]
    rows = shown("vim_smoke")
    assert [rows[f"model.{name}"] for name in ("n_classes", "in_channels", "img_size")] == [unread] * 3
    assert rows["model.patch_size"][-1] in ("default", "size")
    rows = shown("vim_smoke", "data.img_size=32", "model.n_classes=7")
    assert rows["model.img_size"] == ["32", "data"] and rows["model.n_classes"] == ["7", "run"]
    assert shown("mamba_lm_smoke", "data=recall")["model.vocab_size"] == unread


@pytest.mark.parametrize("name", ["series_file", "images", "masks", "objects", "moving_shapes", "recall"])
def test_what_data_say_is_known_by_their_kind(name):
    from selectra.registry import datasets
    from selectra.spec import Spec
    from selectra.train.job import FACTS

    args = {"seq_len": 24, "horizon": 6} if name == "series_file" else {}
    facts = datasets.build(Spec(name, **args)).facts
    assert all(facts.get(each) is not None for each in FACTS[datasets.entry(name).kind])


@pytest.mark.parametrize("sort", ["models", "data", "tasks", "recipes", None])
def test_list(call, sort):
    code, text, _ = call("list", *([sort] if sort else []), "--kind", "series")
    assert code == 0
    expected = {"models": "tsm2_base", "data": "series_file", "tasks": "forecasting", "recipes": "tsm2_weather"}
    assert [name in text for key, name in expected.items() if sort in (None, key)]
    assert "_smoke" not in text
    assert sort not in ("models", None) or "works" in text


def test_data_is_listed_checked_and_got(call, tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTRA_DATA", str(tmp_path))
    monkeypatch.setenv("SELECTRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    content = ("date,a,b\n" + "\n".join(f"2020-01-{day:02d},{day},{day**2}" for day in range(1, 31))).encode()
    with serving(content, whole) as server:
        file = PublicFile("days.csv", server.url, hashlib.sha256(content).hexdigest(), len(content))
        days = replace(PUBLIC["exchange"], name="Days", files=(file,), rows=30, n_series=2)
        monkeypatch.setitem(PUBLIC, "days", days)
        assert "Days" in call("data")[1] and server.url in call("data", "list", "days")[1]
        assert "Days: not here" in call("data", "check")[1]
        code, text, _ = call("data", "get", "days")
        assert code == 0 and f"loaded and checked: {tmp_path / 'cache' / 'data' / 'days.csv'}" in text
        assert "already here, checked" in call("data", "get", "DAYS", "days")[1]
        assert len(server.asked) == 1
        code, text, _ = call("data", "get", "days", "--to", tmp_path / "own")
        assert code == 0 and f"SELECTRA_DATA={tmp_path / 'own'}" in text and (tmp_path / "own" / "days.csv").exists()
    assert "Days: whole; 30 rows of 2 series, every D, 0.00% missing" in call("data", "check", "days")[1]
    for path in tmp_path.glob("**/days.csv"):
        path.write_bytes(content[:-1])
    code, _, text = call("data", "check")
    assert code == 2 and "days.csv': its content is not the published one" in text and "selectra data get Days" in text
    assert text.count("\n") == 1


def test_a_public_set_is_forecast_by_name(call, tmp_path, data_folder):
    code, text, _ = call("forecast", "exchange", "--model", "naive", "--horizon", 96, "--out", tmp_path / "out")
    assert code == 0 and "7,588 rows" in text and "1,422 windows" in text
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics[0]["mse"] == pytest.approx(0.081, abs=1e-3)


def test_cite_is_the_citation_file(call):
    code, text, _ = call("cite")
    assert code == 0
    assert text.startswith("@software{selectra,")
    cff = Path(__file__).parents[1] / "CITATION.cff"
    if cff.is_file():
        title = text.partition("title = {")[2].partition("}")[0]
        assert title in cff.read_text()


def test_version(call):
    assert call("--version")[1].startswith("selectra ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("forecast --horizn 3", "has no option '--horizn'; it has .* Did you mean --horizon (int)?"),
        ("forecast --splt ett", "Did you mean --split (auto | ett | ratio | last)?"),
        ("forecast --quik", "Did you mean --quick (no value)?"),
        ("forecast --horizon x", "Invalid value for '--horizon'"),
        ("forecast --horizon 0", "Invalid value for '--horizon'"),
        ("lst", "No such command 'lst'"),
        ("train", "Missing argument"),
        ("train tsm2_wether", "'tsm2_wether' is no recipe, model or run.json; .* Did you mean 'tsm2_weather'?"),
        ("train tsm2_weather model=tsm3", "there is no model 'tsm3'; .* Did you mean 'tsm2'?"),
        ("train tsm2_weather model.dstate=3", "takes no argument 'dstate'; .* Did you mean 'd_state' (int)?"),
        ("train tsm2_weather model.d_state=x", "'d_state' is 'x', which is no int"),
        ("train tsm2_weather model.horizon=7", "'horizon' is 7 in the run, and the data says 24"),
        ("train tsm2_weather train.stpes=7", "Did you mean 'steps'?"),
        ("train tsm2_weather task.loss=rmse", "which is no 'mse' | 'mae' | 'huber'"),
        ("train tsm2_weather --out /dev/null/x", "cannot write in the folder '/dev/null/x'"),
        ("train nowhere.json", "there is no 'nowhere.json'"),
        ("train tsm2_weather data.path=nowhere.csv --out {tmp}", "nowhere.csv"),
        ("train tsm2_weather train.epochs=inf", "'train.epochs' is 'inf'"),
        ("train tsm2_weather optim.betas=0.9,1", "'optim.betas' is '0.9,1'"),
        ("train tsm2_weather model.dropout=1 --out {tmp}", "dropout=1.0: must be at least 0 and less than 1"),
        ("train linear task.target_index=99 --out {tmp}", "'task.target_index' is (99,), and the data has"),
        ("data get", "name at least one set to get; there are: ETTh1, "),
        ("data gt ETTh1", "'gt' is not one of 'list', 'get', 'check'"),
        ("data check Wether", "no public set 'Wether'; did you mean 'Weather'"),
        ("data check --to {tmp}", "--to says where `selectra data get` puts files"),
        ("data check ECL Solar", "ECL is not here; get it with: selectra data get ECL. Solar is not here"),
        ("forecast ECL", "ECL (electricity.csv) is not on this machine; .* selectra data get ECL"),
        ("eval nowhere", "there is no 'nowhere'"),
        ("eval nowhere --split tst", "Invalid value for '--split'"),
        (
            "list models --kind serie",
            "there is no kind 'serie'; there are "
            "['detection', 'image', 'language', 'segmentation', 'series', 'video']. .* Did you mean 'series'?",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_2(call, words, message, tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTRA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SELECTRA_CACHE", str(tmp_path / "cache"))
    code, _, text = call(*words.format(tmp=tmp_path).split())
    assert code == 2
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    for part in message.split(" .* "):
        assert part in text


def trained(call, csv, out: Path) -> list[str]:
    words = ["train", "dlinear", *SHORT[1:], f"data.path={csv}", "train.steps=4", "train.threads=1", "--out", str(out)]
    assert call(*words)[0] == 0
    return words


def test_changed_data_is_refused_in_words(call, csv, tmp_path):
    out = tmp_path / "out"
    words = trained(call, csv, out)
    frame = pd.read_csv(csv)
    frame.loc[390, "a"] += 1
    frame.to_csv(csv, index=False)
    code, _, text = call("eval", out)
    assert code == 2
    assert "rows and series are the same, and values are not" in text
    assert "--changed-data" in text
    assert call("eval", out, "--changed-data")[0] == 0
    frame.iloc[:-10].to_csv(csv, index=False)
    code, _, text = call(*words)
    assert code == 2
    assert "rows: 400 then and 390 now" in text
    assert call(*words, "--anew")[0] == 0
    assert call("eval", out)[0] == 0


def test_anew_leaves_no_old_weights_beside_a_new_run(call, csv, tmp_path, monkeypatch):
    from selectra.models import DLinear

    out = tmp_path / "out"
    words = trained(call, csv, out)

    def killed(*_: object, **__: object) -> None:
        raise SystemExit(9)

    monkeypatch.setattr(DLinear, "forward", killed)
    assert call(*words, "--anew", "train.steps=5")[0] == 9
    assert not (out / "model.safetensors").exists()
    assert not (out / "checkpoints").exists()
    code, _, text = call("eval", out)
    assert (code, "there are no weights" in text) == (2, True)


def test_ctrl_c_outside_the_loop_says_so(call, csv, tmp_path, monkeypatch):
    from selectra.train import job

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "build", interrupted)
    code, _, text = call("train", "linear", *SHORT[1:], f"data.path={csv}", "--out", tmp_path / "out")
    assert code == 130
    assert "stopped at once; what was saved before is kept." in text


def test_a_name_comes_before_a_folder(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("linear", "liner"):
        Path(name).mkdir()
    assert call("show", "linear")[0] == 0
    code, _, text = call("show", "liner")
    assert code == 2
    assert "holds no run.json" in text
    assert "Did you mean 'linear'" in text


def test_run_that_is_no_text(call, tmp_path):
    (tmp_path / "run.json").write_bytes(b"\xff\xfe\x00{")
    for command in ("eval", "show"):
        code, _, text = call(command, tmp_path)
        assert (code, text.count("\n")) == (2, 1)
        assert "cannot be read as text" in text


def test_only_the_first_process_prints_the_error(call, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert call("eval", "nowhere") == (2, "", "")


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="there is no 'nowhere'"):
        main(["--debug", "eval", "nowhere"])


def test_forecast_defaults_are_those_of_the_job():
    from selectra.forecaster import ForecastJob

    assert tuple(FORECAST_MODELS.split(",")) == ForecastJob().models


def test_forecast(call, csv, tmp_path):
    out = tmp_path / "out"
    words = ("forecast", csv, "--model", "linear,naive", "--lookback", 24, "--horizon", 6, "--out", out)
    assert call(*words)[0] == 0
    rows = json.loads((out / "metrics.json").read_text())
    assert [row["model"] for row in rows] == ["linear", "naive"]


def test_doctor_gives_its_exit_code(call, monkeypatch):
    from selectra import doctor

    for code in (0, 1):
        monkeypatch.setattr(doctor, "doctor", lambda console, code=code: code)
        assert call("doctor")[0] == code


def test_bench_writes_a_record_named_by_hardware_and_date(call, monkeypatch, tmp_path):
    from selectra.bench import scan
    from selectra.train.record import environment

    def bench_scan(device, seconds, console, save):
        save({"device": str(device), "environment": environment(), "rows": []})

    monkeypatch.setattr(scan, "bench_scan", bench_scan)
    assert call("bench", "scan", "--device", "cpu", "--out", tmp_path)[0] == 0
    (record,) = tmp_path.iterdir()
    assert record.name.startswith("scan-")
    assert json.loads(record.read_text())["device"] == "cpu"
    code, _, text = call("bench", "scan", "--device", "gpu")
    assert (code, "allowed are" in text) == (2, True)


def test_help_needs_neither_torch_nor_pandas():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    code = "import sys, selectra.cli; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    command = [sys.executable, "-m", "selectra", "--help"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "forecast" in done.stdout
