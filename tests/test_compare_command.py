"""`selectra compare` and `selectra report` for a user: own data, budgets, bad input in words."""

from pathlib import Path

import pytest

from selectra.cli import main
from selectra.compare import questions
from selectra.compare.match import meet
from selectra.compare.questions import Asked, amount_of, find_study, forecasting_study, vision_study
from selectra.compare.study import Tuning
from selectra.errors import ConfigError, DataError
from selectra.registry import models, studies
from selectra.runs import registries
from selectra.spec import Spec
from selectra.train import job
from tests.compare.small import write_series
from tests.compare.studies import make_study


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str]:
    with pytest.raises(SystemExit) as ended:
        main(words)
    found = capsys.readouterr()
    return ended.value.code, found.out + found.err


def test_own_data_in_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_series(tmp_path)
    words = ["compare", "forecasting", "series.csv", "--models", "tsm2_smoke,dlinear,naive", "--lookback", "16"]
    words += ["--horizon", "4", "--steps", "4", "--trials", "0", "--device", "cpu", "--workers", "1"]
    code, text = said(capsys, *words)
    assert code == 0, text
    assert "Should I use Mamba to forecast series?" in text
    assert "7 cells done, 0 failed, 0 left" in text
    assert "parameters" in text and "MFLOPs a sample" in text and "of activations" in text
    for suffix in (".sqlite", ".html", ".md", ".csv", ".json"):
        assert (tmp_path / f"forecasting_series{suffix}").stat().st_size > 500
    page = (tmp_path / "forecasting_series.html").read_text()
    assert "Where Mamba wins" in page and "Where Mamba loses" in page
    # Again: nothing to do but the page.
    code, text = said(capsys, *words)
    assert "7 cells are done, 0 are left" in text
    code, text = said(capsys, *words, "--seeds", "4")
    assert code == 2
    assert "holds another study" in text


def test_a_table_that_lies_where_the_report_would_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_series(tmp_path)
    mine, before = tmp_path / "series.csv", (tmp_path / "series.csv").read_bytes()
    words = ["--models", "tsm2_smoke,dlinear", "--lookback", "16", "--horizon", "4", "--steps", "2", "--trials", "0"]
    words += ["--device", "cpu", "--workers", "1"]
    code, text = said(capsys, "compare", "forecasting", "series.csv", *words, "--store", "series.sqlite")
    assert code == 2 and "'series.csv' is there, is no report of this kind" in text and "--store" in text
    # Nothing was trained for it.
    assert "measured" not in text and mine.read_bytes() == before
    code, text = said(capsys, "compare", "forecasting", "series.csv", *words)
    assert code == 0, text
    for out in ("series.html", "notes.html"):
        (tmp_path / "notes.md").write_text("# What I thought\n")
        code, text = said(capsys, "report", "forecasting_series.sqlite", "--out", out)
        assert code == 2 and "is no report of this kind" in text
    (tmp_path / "own.json").write_text("[1, 2]")
    code, text = said(capsys, "report", "forecasting_series.sqlite", "--export", "own.json")
    assert code == 2 and "'own.json' is there" in text
    assert mine.read_bytes() == before and (tmp_path / "own.json").read_text() == "[1, 2]"
    assert (tmp_path / "notes.md").read_text() == "# What I thought\n"
    # What an earlier report left is written anew.
    code, text = said(capsys, "report", "forecasting_series.sqlite")
    assert code == 0, text


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["forecasting", "absent.csv"], "there is no 'absent.csv'"),
        (["nothing"], "there are ['forecasting', 'vision', 'language', 'detection', 'segmentation'"),
        (["absent.py"], "there is no 'absent.py'; a study is a file of Python"),
        (["forecasting", "--models", "dlinear,linear"], "is a Mamba model; name one, such as tsm2"),
        (["forecasting", "--models", "tsm3"], "there is no model 'tsm3'"),
        (["forecasting", "--seeds", "2"], "too few for a verdict"),
        (["forecasting", "--models", "tsm2"], "['tsm2'] is one model, and a comparison is of two or more"),
        (["forecasting", "--models", "tsm2,tsm2"], "got 'tsm2,tsm2'"),
        (["forecasting", "--models", "tsm2,,linear"], "got 'tsm2,,linear'"),
        (["forecasting", "--budget-params", "5X"], "'5X' is no amount; write 5M, 300k or 1.2e6"),
        (["forecasting", "--budget-params", "5M", "--budget-flops", "1G"], "models are brought to one budget"),
        (["forecasting", "--tables", "a", "--quick"], "they take no file, study or --quick"),
        (["forecasting", "--img-size", "8"], "--img-size is for `compare vision`"),
        (["vision", "--horizon", "99"], "--horizon is for `compare forecasting`; images have --img-size; leave it"),
        (["vision", "--lookback", "1"], "--lookback is for `compare forecasting`"),
        (["language", "--img-size", "77"], "--img-size is for other kinds of data"),
        (["language", "--horizon", "99"], "--horizon is for other kinds of data"),
        (["selection", "--horizon", "720"], "--horizon is for a table of your own, as in `compare selection my.csv`"),
        (["image_kinds", "folder", "--lookback", "7"], "studies of series, and 'image_kinds' is none"),
        (["own.py", "my.csv"], "the second argument is for studies that have a name"),
        (["own.py", "--lookback", "7"], "--lookback is for studies that have a name"),
        (["costs", "--horizon", "7"], "--horizon is for studies; `compare costs` trains nothing"),
        (["costs", "--trials", "0"], "--trials is for studies"),
        (["forecasting", "--tables", "a", "--models", "tsm2"], "--models is for studies; the built-in tables"),
        (["forecasting", "--tables", "a", "--seeds", "4"], "--seeds is for studies; the built-in tables"),
        (["forecasting", "--match", "depth"], "and there is none; name one, such as --budget-params 5M"),
        (["forecasting", "--match", "height"], "'width', 'depth'"),
        (["costs", "--match", "depth"], "--match is for studies"),
        (
            ["selection", "--quick"],
            "quick is for `compare` of forecasting, vision, language, detection, segmentation; other",
        ),
    ],
)
def test_bad_input_is_refused_in_words(words: list[str], found: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, "compare", *words, "--device", "cpu")
    assert code == 2
    assert found in text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1\ndef (\n", "'own.py', line 2, is no Python: "),
        ("from selectra.compare.study import Study\n\nstudy = Study(name='x')\n",
         "'own.py', line 3: Study: question: Field required."),
        ("from selectra.spec import Train\n\n\ndef f():\n    return Train(steps=-1)\n\nf()\n",
         "'own.py', line 5: Train: steps is -1: "),
        ("from selectra.spec import Spec\nSpec('a', b=object())\n", "'own.py', line 2: argument 'b' has the value"),
        ("import absent_module\n", "'own.py', line 1: No module named 'absent_module'"),
        ("study = Studie()\n", "'own.py', line 1: name 'Studie' is not defined"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_study_s_file_is_said_with_its_line(
    text: str, found: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    Path("own.py").write_text(text)
    code, shown = said(capsys, "compare", "own.py")
    assert code == 2 and found in shown, shown


def test_rows_of_a_forecast_reach_a_study_on_ones_own_table() -> None:
    for what in ("selection", "forecasting"):
        Path("my.csv").touch()
        data = find_study(what, Asked(file="my.csv", lookback=7, horizon=720)).bases[0].data
        assert (data.args["seq_len"], data.args["horizon"]) == (7, 720)
        data = find_study(what, Asked(file="my.csv")).bases[0].data
        assert (data.args["seq_len"], data.args["horizon"]) == (96, 24)


@pytest.mark.parametrize(("text", "amount"), [("5M", 5e6), ("300k", 3e5), ("1.2e6", 1.2e6), ("2G", 2e9), ("7", 7.0)])
def test_amounts_as_people_write_them(text: str, amount: float) -> None:
    assert amount_of(text) == amount


def test_models_are_matched_by_depth_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_series(tmp_path)
    words = ["compare", "forecasting", "series.csv", "--models", "tsm2_smoke,itransformer_smoke", "--lookback", "16"]
    words += ["--horizon", "4", "--steps", "2", "--trials", "0", "--device", "cpu", "--workers", "1"]
    code, text = said(capsys, *words, "--budget-params", "4320", "--match", "depth")
    assert code == 0, text
    assert "itransformer_smoke (depth = 9 for 4,364 params)" in text
    # The study's own budget is kept, and turned.
    found = find_study("image_kinds", Asked(match="depth")).budget
    assert found is not None and (found.amount, found.over) == (2_200_000, "depth")


@pytest.mark.parametrize("text", ["", "M", "-5M", "infM", "nan", "5 apples"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(ConfigError, match="is no amount"):
        amount_of(text)


def test_the_quick_study_has_five_kinds_on_the_bundled_data() -> None:
    study = forecasting_study(Asked(quick=True))
    study.check()
    assert len(study.variants) == 5
    assert {each.kind for each in study.variants} == {"mamba", "attention", "recurrent", "linear"}
    assert (study.seeds, study.bases[0].data.args.get("path")) == (3, None)
    with pytest.raises(DataError, match="there is no"):
        forecasting_study(Asked(file="absent.csv"))


@pytest.mark.parametrize(
    ("tuning", "ranges"),
    [
        (
            Tuning(ranges={"optim.weight_decay": (0.01, 1.0)}, trials=5, prune=False),
            {"optim.weight_decay": (0.01, 1.0)},
        ),
        (Tuning(values={"optim.lr": (0.05, 0.01, 0.02)}), {"optim.lr": (0.01, 0.05)}),
        (None, {"optim.lr": (1e-4, 1e-2)}),
    ],
)
def test_trials_are_drawn_from_a_study_s_own_ranges(
    tuning: Tuning | None, ranges: dict[str, tuple[float, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    study = make_study(write_series(tmp_path), tuning=tuning, declared={"optim.lr": "x", "optim.weight_decay": "x"})
    monkeypatch.setattr(questions, "_from_file", lambda path: study)
    found = find_study("own.py", Asked(trials=9)).tuning
    assert found is not None
    assert (found.ranges, found.trials, found.prune) == (ranges, 9, tuning is None or tuning.prune)


def test_values_that_span_nothing_are_not_drawn_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(write_series(tmp_path), tuning=Tuning(values={"optim.schedule": ("cosine", "constant")}))
    monkeypatch.setattr(questions, "_from_file", lambda path: study)
    with pytest.raises(ConfigError, match="between which nothing can be drawn; leave --trials"):
        find_study("own.py", Asked(trials=9))


def test_images_are_asked_for_where_there_are_any() -> None:
    from selectra.registry import datasets

    if "images" in datasets.names("image"):
        study = vision_study(Asked(quick=True))
        study.check()
        assert (study.metric, study.higher_is_better) == ("top1", True)
    else:
        with pytest.raises(ConfigError, match="needs the data set 'images'"):
            vision_study(Asked(quick=True))


@pytest.mark.parametrize(
    "name",
    [
        "channel_mixers",
        "cifar10",
        "directions",
        "language_copying",
        "language_recall",
        "language_shakespeare",
        "selection",
        "series_kinds",
    ],
)
def test_built_in_studies_are_fair_and_resolve(name: str) -> None:
    study = find_study(name, Asked())
    assert name in studies.names()
    study.check()
    assert study.name == name
    assert studies.entry(name).summary
    for variant in study.variants:
        run = job.typed(study.run(study.bases[0], variant, 0))
        assert set(job.check(run)) == {"model", "data", "task"}


@pytest.mark.parametrize("name", ["image_kinds", "scan_orders", "channel_mixers_images"])
@pytest.mark.parametrize("n_classes", [4, 10, 21])
def test_built_in_studies_of_images_meet_their_budget_whatever_the_classes(name: str, n_classes: int) -> None:
    study, facts = find_study(name, Asked()), {"n_classes": n_classes, "in_channels": 3, "img_size": 32}
    assert study.budget is not None
    for variant in study.variants:
        found = meet(variant.model, facts, study.budget.quantity, study.budget.amount)
        assert found.off(study.budget.amount) <= 0.02, variant.name


def test_a_text_of_ones_own_in_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tables.txt").write_text("".join(f"{i} plus {j} is {i + j}.\n" for i in range(30) for j in range(30)))
    words = ["compare", "language", "tables.txt", "--quick", "--models", "gpt_smoke,mamba_lm_smoke", "--steps", "2"]
    words += ["--trials", "0", "--device", "cpu", "--workers", "1", "--budget-params", "39600", "--batch-size", "2"]
    code, text = said(capsys, *words)
    assert code == 0, text
    assert "Should I use Mamba to model tables?" in text and "6 cells done, 0 failed, 0 left" in text
    page = (tmp_path / "language_tables.md").read_text()
    assert "loss" in page and "mamba_lm_smoke" in page
    code, text = said(capsys, "compare", "language", "absent.txt")
    assert code == 2 and "there is no 'absent.txt'" in text
    # Without a file it is the built-in study.
    assert find_study("language", Asked()).name == "language_shakespeare"


def test_studies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, "list", "studies")
    assert code == 0
    assert "selection" in text
    assert sorted(registries()) == ["data", "models", "recipes", "studies", "tasks"]


def test_parts_that_studies_leave_out() -> None:
    facts = {"seq_len": 24, "horizon": 8, "n_series": 3}

    def count(name: str, **args: object) -> int:
        return sum(each.numel() for each in models.build(Spec(name, **args), facts).parameters())

    assert count("simba_series", channel_mixer="none") < count("simba_series", channel_mixer="einfft")
    assert count("s_mamba", d_model=16, directions="ahead") < count("s_mamba", d_model=16)
    with pytest.raises(ConfigError, match="directions"):
        models.build(Spec("s_mamba", directions="back"), facts)


def test_without_trials_no_page_says_that_trials_chose(tmp_path: Path) -> None:
    write_series(tmp_path)
    asked = Asked(str(tmp_path / "series.csv"), trials=0)
    assert find_study("forecasting", asked).declared == {}
    assert "optim.lr" in find_study("forecasting", Asked(asked.file)).declared
    # What a variant changes itself stays declared.
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\nfrom tests.compare.studies import VARIANTS, Variant, Spec, make_study\n"
        f"study = make_study(Path({asked.file!r}), variants=(*VARIANTS, Variant(name='x', model=Spec('nlinear'), "
        "changes=('optim.lr=0.5',))))\n"
    )
    assert "optim.lr" in find_study("own.py", Asked(trials=0)).declared


def test_a_report_of_what_is_not_there_or_damaged_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # What a refused comparison leaves: a file that holds nothing yet.
    write_series(tmp_path)
    code, _ = said(capsys, "compare", "forecasting", "series.csv", "--lookback", "5000", "--device", "cpu")
    assert code == 2
    code, text = said(capsys, "report", "forecasting_series.sqlite")
    assert code == 2 and "'forecasting_series.sqlite' holds nothing yet" in text
    Path("half.json").write_text('{"what": "selectra study", "format": 1, "name": "x"}')
    code, text = said(capsys, "report", "half.json")
    assert code == 2 and "'half.json' is damaged: it has no question" in text
    code, text = said(capsys, "report", ".", "--out", "answer.md")
    assert code == 2 and "'half.json' is damaged or of another version: it has no question" in text
    code, text = said(capsys, "report", "half.json", "--out", "absent/page.html")
    assert code == 2 and "the folder 'absent' does not exist" in text
    Path("pictures").mkdir()
    code, text = said(capsys, "report", "pictures")
    assert code == 2 and "there are no records, NAME.json, in 'pictures'" in text and not Path("answer.md").exists()
    # An answer of somebody's own is no page of ours.
    Path("records").mkdir()
    Path("records/other.json").write_text("{}")
    Path("answer.md").write_text("# My answer\n")
    code, text = said(capsys, "report", "records")
    assert code == 2 and "'answer.md' is there, is no report of this kind" in text
    assert Path("answer.md").read_text() == "# My answer\n"
    code, text = said(capsys, "report", "records", "--out", "other.md")
    assert code == 0 and Path("other.md").is_file()
