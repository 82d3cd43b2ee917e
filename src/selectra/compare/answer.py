"""Whether Mamba is useful, from all records of a folder: what each says, and what has none yet."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from selectra.compare.stats import FEWEST, contrast, grain, judged, over_bases
from selectra.errors import DataError

Row = dict[str, Any]
# What a whole answer needs: the question, and the command that makes its record.
QUESTIONS = {
    "forecasting": ("Forecasting: Mamba against other kinds of models", "selectra compare forecasting"),
    "images": ("Images: Mamba against attention and convolutions at equal parameters", "results/vision_cifar10.py"),
    "language": ("Language: what Mamba and attention have learned, speed aside", "selectra compare language"),
    "costs": ("Time, memory and energy at equal parameters", "selectra compare costs --device cuda"),
    "selection": ("Token and channel selection (MambaMixer's ablation)", "selectra compare selection"),
    "selection_images": ("Token and channel selection on images", "selectra compare selection_images"),
    "channel_mixers": ("Channel mixers (SiMBA's ablation)", "selectra compare channel_mixers"),
    "channel_mixers_images": ("Channel mixers on images", "selectra compare channel_mixers_images"),
    "channel_mixers_deep": ("Channel mixers in deep stacks", "selectra compare channel_mixers_deep"),
    "scan_orders": ("Scan orders in 2D", "selectra compare scan_orders"),
    "language_copying": ("Language: copying by length", "selectra compare language_copying"),
    "language_recall": ("Language: recall by number of pairs", "selectra compare language_recall"),
    "series_kinds": ("Series: kinds of models at equal parameters", "selectra compare series_kinds"),
    "image_kinds": ("Images: kinds of models at equal parameters", "selectra compare image_kinds"),
    "directions": ("Both directions or one", "selectra compare directions"),
    "discretisation": ("What discretisation buys", "selectra compare discretisation"),
}  # fmt: skip
# What else answers a question: another study, and those of `selectra compare vision folder/` and the like, by the
# first word of their names.
SAME = {"cifar10": "images", "forecasting": "forecasting", "vision": "images", "language": "language"}
# What is read of a study.
NEEDED = ("name", "question", "kinds", "subject", "metric", "higher_is_better", "seeds", "rows", "cells", "overall",
          "verdict")  # fmt: skip
MAMBA_IMAGES = ("vim2", "vmamba", "vim", "simba")
IMAGES = "CIFAR-10-JPEG, top-1, equal parameters and steps, three seeds, after Holm's correction"
OUTCOMES = {"better": "wins", "worse": "loses", "level": "level"}


def collect(folder: Path) -> Row:
    """What the records of a folder say.

    Raises:
        DataError: There is no such folder, or a record in it is damaged.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder '{folder}'; name one with records, such as results.")
    records = {path.name: _read(path) for path in sorted(folder.glob("*.json"))}
    found: Row = {"claims": [], "points": [], "speed": [], "parts": [], "table": [], "said": [], "unfinished": [],
                  "answered": set()}  # fmt: skip
    _forecasting(found, _of(records, "selectra compare forecasting"))
    _images(found, _of(records, "vision_cifar10"))
    _studies(found, _of(records, "selectra study"))
    _costs(found, _of(records, "selectra costs"))
    _lengths(found, {name: each for name, each in records.items() if each.get("benchmark") == "lengths"})
    answered = found.pop("answered")
    begun = {each["answers"] for each in found["unfinished"]}
    missing = [{"question": question, "command": command} for name, (question, command) in QUESTIONS.items()
               if name not in answered | begun]  # fmt: skip
    return {**found, "missing": missing, "verdict": _verdict(found, found.pop("said"))}


def _read(path: Path) -> Row:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"'{path}' cannot be read as a record: {error}.") from error
    return content if isinstance(content, dict) else {}


def _of(records: dict[str, Row], what: str) -> dict[str, Row]:
    return {name: each for name, each in records.items() if each.get("what") == what}


def _claim(found: Row, outcome: str, text: str, names: Iterable[str]) -> None:
    found["claims"].append({"outcome": outcome, "text": text, "records": sorted(set(names))})


def _line(found: Row, what: str, mamba: str, by_outcome: dict[str, list[str]]) -> None:
    """One Mamba model against all its rivals, for the table at the top."""
    found["table"].append({"what": what, "mamba": mamba, **{key: by_outcome.get(key, []) for key in OUTCOMES.values()}})


def _point(found: Row, panel: str, names: tuple[str, str], each: Row, outcome: str, higher_is_better: bool) -> None:
    """By how many per cent of the rival's score Mamba is better, with the interval."""
    sign = 1 if higher_is_better else -1
    low, high = sorted((sign * each["low"], sign * each["high"]))
    found["points"].append({"panel": panel, "mamba": names[0], "rival": names[1], "outcome": outcome,
                            "value": sign * each["difference"], "low": low, "high": high})  # fmt: skip


def _forecasting(found: Row, records: dict[str, Row]) -> None:
    for name, record in records.items():
        verdict = record["verdict"]
        if verdict["mamba"] is None:
            continue
        by_outcome = defaultdict(list)
        for rival, each in verdict["pairs"]["one"].items():
            low, high = each["corrected"]
            outcome = "wins" if high < 0 else "loses" if low > 0 else "level"
            by_outcome[outcome].append(rival)
            shares = {key: 100 * each[key] / each["rival"] for key in ("difference", "low", "high")}
            panel = f"Forecasting, mean MSE of {verdict['cells']} cells"
            _point(found, panel, (verdict["mamba"], rival), shares, outcome, False)
            _claim(found, outcome, (
                f"Forecasting: {verdict['mamba']} against {rival}, mean MSE over {verdict['cells']} cells "
                f"{each['mean']:.4f} and {each['rival']:.4f} (difference {each['difference']:+.4f}, 95 % interval "
                f"{each['low']:+.4f} to {each['high']:+.4f}, corrected for {each['compared']} rivals {low:+.4f} to "
                f"{high:+.4f}; lower on {each['wins']} of {each['pairs']} cells)"
            ), [name])  # fmt: skip
        found["answered"].add("forecasting")
        _line(found, f"Forecasting, mean of {verdict['cells']} cells", verdict["mamba"], by_outcome)


def _top1(records: dict[str, Row]) -> dict[str, dict[int, float]]:
    """Of every model and seed; trainings of other lengths are another comparison, the longest is what counts."""
    trainings = [each for record in records.values() for each in record["trainings"]
                 if each["recipe"].endswith("_cifar10")]  # fmt: skip
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for training in trainings:
        if training["steps"] == max(each["steps"] for each in trainings):
            found[training["recipe"].removesuffix("_cifar10")][training["seed"]] = training["test"]["top1"]
    return found


def _images(found: Row, records: dict[str, Row]) -> None:
    records = {name: record for name, record in records.items() if _top1({name: record})}
    top1 = _top1(records)
    pairs = [(mamba, rival) for mamba in top1 if mamba in MAMBA_IMAGES for rival in top1 if rival not in MAMBA_IMAGES]
    pairs = [(mamba, rival) for mamba, rival in pairs if len(top1[mamba].keys() & top1[rival].keys()) >= FEWEST]
    if not pairs:
        return
    contrasts = [contrast(*_common(top1[mamba], top1[rival])) for mamba, rival in pairs]
    results = dict(zip(pairs, judged(contrasts, higher_is_better=True), strict=True))
    for names, each in results.items():
        if each["unit"] == "%":
            _point(found, "CIFAR-10-JPEG, top-1", names, each, OUTCOMES[each["outcome"]], True)
    for rival in dict.fromkeys(rival for _, rival in pairs):
        by_outcome: dict[str, list[str]] = defaultdict(list)
        for (mamba, other), each in results.items():
            if other == rival:
                by_outcome[OUTCOMES[each["outcome"]]].append(f"{mamba} {100 * each['mean']:.1f} %")
        theirs = 100 * fmean(top1[rival].values())
        for outcome, models in by_outcome.items():
            said = {"wins": "is beaten by", "loses": "beats", "level": "is not told apart from"}[outcome]
            _claim(found, outcome, f"Images ({IMAGES}): {rival}, {theirs:.1f} %, {said} {', '.join(models)}", records)
    found["answered"].add("images")
    for mamba in dict.fromkeys(mamba for mamba, _ in pairs):
        by_outcome = defaultdict(list)
        for rival in (rival for name, rival in pairs if name == mamba):
            by_outcome[OUTCOMES[results[mamba, rival]["outcome"]]].append(rival)
        _line(found, "CIFAR-10-JPEG", mamba, by_outcome)


def _common(ours: dict[int, float], theirs: dict[int, float]) -> tuple[list[float], list[float]]:
    seeds = sorted(ours.keys() & theirs.keys())
    return [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]


def _studies(found: Row, records: dict[str, Row]) -> None:
    for name, record in records.items():
        if absent := [key for key in NEEDED if key not in record]:
            raise DataError(f"'{name}' is damaged or of another version: it has no {', '.join(absent)}; export it "
                            "again from its store with `selectra report`, or take it out of the folder.")  # fmt: skip
        left = _left(found, name, record)
        if not left:
            found["answered"].add(_question(record["name"]))
        if "mamba" in record["kinds"].values():
            _contest(found, name, record, left)
            continue
        found["parts"].append({
            "question": record["question"], "text": record["verdict"]["text"], "records": [name],
            # A training that was done again, with other code, say, is one.
            "trainings": left or str(len({(cell["base"], cell["variant"], cell["seed"]) for cell in record["cells"]
                                          if "test" in cell})),
            "rows": [{key: row[key] for key in ("base", "variant", "mean", "spread")} | {
                "parameters": row["cost"]["parameters"], "seeds": len(row["values"])} for row in record["rows"]],
            "metric": record["metric"],
        })  # fmt: skip


def _left(found: Row, name: str, record: Row) -> str:
    """How far a study is, as in "15 of 20"; empty where every training has ended. Noted where it has not.

    A training that failed has ended: its study's page says why.
    """
    ended = {(cell["base"], cell["variant"], cell["seed"]) for cell in record["cells"]}
    done, failed, left = 0, 0, 0
    for row in record["rows"]:
        open_ = [seed for seed in row["missing"] if (row["base"], row["variant"], seed) not in ended]
        # Where every trial failed nothing was scored, and nothing will be.
        open_ = [] if row["reasons"] and len(open_) == len(row["missing"]) else open_
        done, failed = done + len(row["values"]), failed + len(row["missing"]) - len(open_)
        left += len(open_)
    if not left:
        return ""
    answers, told = _question(record["name"]), f"{done} of {done + left + failed}"
    question, command = QUESTIONS.get(answers, (record["question"], None))
    found["unfinished"].append({"question": question, "answers": answers, "trainings": told, "failed": failed,
                                "command": record.get("command", command), "records": [name]})  # fmt: skip
    return told


def _question(name: str) -> str:
    """The question that a study answers: its own, or that of the command that made it, as `language_my_text`."""
    return name if name in QUESTIONS else SAME.get(name.partition("_")[0], name)


def _contest(found: Row, name: str, record: Row, left: str) -> None:
    """A study of Mamba against other kinds: its comparisons are claims like others, of every Mamba model in it.

    Args:
        left: How far it is, where it is not finished; then what is claimed is of models whose trainings all ended well.
    """
    bases, metric = _data(record) + (f", unfinished, {left} trainings" if left else ""), record["metric"]
    compared = [(subject, each) for subject, contrasts in _by_mamba(record).items() for each in contrasts]
    results = judged([each for _, each in compared], record["higher_is_better"])
    for subject in dict.fromkeys(subject for subject, _ in compared):
        by_outcome: dict[str, list[str]] = defaultdict(list)
        for each in (result for result, (model, _) in zip(results, compared, strict=True) if model == subject):
            outcome, signed = OUTCOMES[each["outcome"]], "{:+.1f} %" if each["unit"] == "%" else "{:+.4f}"
            by_outcome[outcome].append(each["rival"])
            if each["unit"] == "%":
                names = (subject, each["rival"])
                _point(found, f"{bases}, {metric}", names, each, outcome, record["higher_is_better"])
            low, high = signed.format(each["low"]), signed.format(each["high"])
            text = (f"{bases}: {subject} against {each['rival']}, {metric} {each['mean']:.4f} and "
                    f"{each['rival_mean']:.4f} ({signed.format(each['difference'])}, 95 % interval {low} to {high}; "
                    f"{each['pairs']} seeds; {_chance(each, len(compared))})")  # fmt: skip
            _claim(found, outcome, text, [name])
        if by_outcome:
            _line(found, bases[0].upper() + bases[1:], subject, by_outcome)


def _data(record: Row) -> str:
    """What a study is on, and the parameters that all its models have."""
    budget = record["study"].get("budget") or {}
    size = f", {budget['amount'] / 1e6:.2g} M parameters" if budget.get("quantity") == "params" else ""
    return together(list(dict.fromkeys(row["base"] for row in record["rows"]))) + size


def together(names: Sequence[str]) -> str:
    """Names as one: those that differ in one word share the others, as in "recall of 8, 16 and 32 pairs"."""
    words = [name.split() for name in names]
    places = [i for i, column in enumerate(zip(*words, strict=False)) if len(set(column)) > 1]
    if len({len(each) for each in words}) > 1 or len(places) != 1:
        return ", ".join(names)
    at = places[0]
    several = f"{', '.join(each[at] for each in words[:-1])} and {words[-1][at]}"
    return " ".join([*words[0][:at], several, *words[0][at + 1 :]])


def _by_mamba(record: Row) -> dict[str, list[Row]]:
    """Every Mamba model of a study, its subject first, against every rival; another Mamba is none.

    They are corrected together: two Mamba models have twice the chance of a lucky difference. A model that lacks a
    training is left out: those that ended are not chosen by chance, where others failed.
    """
    kinds, lacking = record["kinds"], {row["variant"] for row in record["rows"] if row["missing"]}
    rivals = [each for each in record["overall"] if kinds.get(each["rival"]) != "mamba"]
    found = {record["subject"]: rivals}
    values: dict[str, list[dict[str, float]]] = defaultdict(list)
    for row in record["rows"]:
        alone = next(iter(row["values"].values()), None) if row["sure"] else None
        # What no seed changes was run once and stands for every seed.
        every = row["values"] if alone is None else {str(seed): alone for seed in range(record["seeds"])}
        values[row["variant"]].append(every)
    for model in (name for name in values if kinds.get(name) == "mamba" and name not in (record["subject"], *lacking)):
        contrasts = []
        for rival in (each["rival"] for each in rivals):
            sides = (values[model], values[rival])
            seeds = sorted(set.intersection(*(set(each) for side in sides for each in side)))
            if len(seeds) >= FEWEST:
                ours, theirs = ([over_bases([base[seed] for base in side]) for seed in seeds] for side in sides)
                rows = [row for row in record["rows"] if row["variant"] in (model, rival)]
                compared = contrast(ours, theirs, grain=grain(rows, record["higher_is_better"]))
                contrasts.append({**compared, "rival": rival, "rival_mean": compared["rival"]})
        found[model] = contrasts
    return found


def _chance(each: Row, n_compared: int) -> str:
    """The corrected p-value, and why a difference is none although its own interval leaves zero out."""
    p_value = "< 0.001" if each["p_adjusted"] < 0.001 else f"{each['p_adjusted']:.3f}"
    told = f"p {p_value}" + (f" after Holm's correction for {n_compared} comparisons" if n_compared > 1 else "")
    if each["outcome"] == "level" and not each["low"] <= 0 <= each["high"]:
        told += f", so not told from chance; its interval, which leaves zero out, is uncorrected: p {each['p']:.3f}"
    return told


def _costs(found: Row, records: dict[str, Row]) -> None:
    for name, record in records.items():
        for kind in record["kinds"].values():
            for each in kind["crossings"]:
                if each["subject"] == kind["subjects"][0] and each["quantity"] in ("unit_us", "unit_mj", "memory_mb"):
                    measured = [row["point"] for row in kind["rows"] if row["mode"] == each["mode"]
                                and row["model"] == each["rival"] and "reason" not in row]  # fmt: skip
                    found["speed"].append({**each, "question": kind["question"], "axis": kind["axis"],
                                           "least": min(measured), "most": max(measured), "records": [name],
                                           "device": record["device"], "params": kind["params"]})  # fmt: skip
    time = [each for each in found["speed"] if each["quantity"] == "unit_us"]
    firsts = {each["question"]: each for each in reversed(time)}
    said = []
    for question, first in firsts.items():
        same = [each for each in time if (each["question"], each["rival"]) == (question, first["rival"])]
        modes = ", ".join(f"{MODES[each['mode']]} {where(each)}" for each in same)
        said.append(f"{first['subject']} against {first['rival']} ({first['axis']}): {modes}")
    if said:
        found["answered"].add("costs")
        found["said"].append(f"Speed, {'; '.join(said)}")


MODES = {"forward": "forward", "step": "training", "decode": "generating"}


def where(each: Row) -> str:
    """From which point on Mamba costs less."""
    if each["point"] is None:
        return f"never the cheaper one up to {each['most']:,}"
    if each["point"] <= each["least"]:
        return f"cheaper from the smallest measured, {each['least']:,}, on"
    return f"cheaper from about {each['point']:,.0f} on"


def _lengths(found: Row, records: dict[str, Row]) -> None:
    found["kernels"] = [{"text": words, "records": [name]} for name, record in records.items()
                        for words in record["findings"]["words"] if "against" in words]  # fmt: skip


def _verdict(found: Row, said: Sequence[str]) -> str:
    """What all claims add up to, and what is no comparison of scores."""
    outcomes = {claim["outcome"] for claim in found["claims"]}
    first = "No record yet" if not outcomes else "It depends" if {"wins", "loses"} <= outcomes else (
        "No gain that can be shown" if "wins" not in outcomes else
        "Better than some models and worse than none, so far" if "level" in outcomes else "Yes, so far"
    )  # fmt: skip
    wins, loses, level = (sum(len(line[key]) for line in found["table"]) for key in OUTCOMES.values())
    if wins + loses + level:
        first += (f": of {wins + loses + level} comparisons of a Mamba model with a rival Mamba wins {wins}, loses "
                  f"{loses}, and is not told apart in {level}")  # fmt: skip
    return ". ".join([first, *said]) + "."
