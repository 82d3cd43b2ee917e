"""Tables of trained image models, as Markdown, from their records alone: accuracy, transfer, stability, targets.

Trainings may lie in several records, such as one a GPU; they are joined where they were made alike. Whoever loses to a
baseline is said to lose.
"""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from scipy import stats

from selectra.bench.scan_table import markdown
from selectra.bench.vision_table import training_table
from selectra.compare.stats import CONFIDENCE, FEWEST, contrast, judged, paired, spread
from selectra.errors import DataError

Record = dict[str, Any]
NAMES = {
    "vim2": "ViM2", "vmamba": "VMamba", "vim": "Vim", "simba": "SiMBA", "rsmamba": "RSMamba",
    "videomamba": "VideoMamba", "vit": "ViT", "swin": "Swin", "convnext": "ConvNeXt", "resnet18": "ResNet-18",
    "mlp_mixer": "MLP-Mixer",
}  # fmt: skip
OURS = ("vim2", "vmamba", "vim", "simba", "rsmamba", "videomamba")
WORDS = {"better": "wins", "worse": "**loses**", "level": "level"}


def joined(records: Sequence[Record]) -> tuple[dict[str, Record], dict[str, dict[int, Record]]]:
    """Costs by recipe, and trainings by recipe and seed; of two of the same, the later record's.

    Raises:
        DataError: Trainings were not made alike.
    """
    costs: dict[str, Record] = {}
    trainings: dict[str, dict[int, Record]] = defaultdict(dict)
    alike: dict[str, Any] = {}
    for record in sorted(records, key=lambda each: each["date"]):
        for row in record["models"]:
            # A record of a CPU knows parameters and FLOPs alone.
            if "train_ms" in row or row["recipe"] not in costs:
                costs[row["recipe"]] = row
        for row in record["trainings"]:
            trainings[row["recipe"]][row["seed"]] = row
        if record["trainings"]:
            changes = sorted(word for word in record["changes"] if not word.startswith("train.steps="))
            made = {"changes": changes, "steps": sorted({row["steps"] for row in record["trainings"]})}
            if alike and alike != made:
                raise DataError(f"trainings of two records were not made alike, {alike} and {made}; name one of them.")
            alike = made
    return costs, trainings


def name_of(recipe: str) -> str:
    """What tables call the model of a recipe."""
    return NAMES.get(_family(recipe), recipe)


def _family(recipe: str) -> str:
    return recipe.rpartition("_")[0]


def accuracies(trainings: dict[int, Record]) -> dict[int, float]:
    """Test accuracy in per cent, by seed."""
    return {seed: 100 * row["test"]["top1"] for seed, row in sorted(trainings.items())}


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean over seeds by Student's t; None for fewer than three."""
    if len(values) < FEWEST or max(values) == min(values):
        return None
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, fmean(values), stats.sem(values))
    return float(low), float(high)


def accuracy_table(*records: Record) -> str:
    """Best first: accuracy with its interval over seeds, parameters, FLOPs, rates, memory."""
    costs, trainings = joined(records)
    rows = []
    for recipe in {**costs, **trainings}:
        values, cost = list(accuracies(trainings.get(recipe, {})).values()), costs.get(recipe, {})
        rows.append(
            (fmean(values) if values else -1.0, [name_of(recipe), *_accuracy_cells(values), *_cost_cells(cost)])
        )
    rows.sort(key=lambda row: -row[0])
    columns = ["model", "top-1, %", "± sd", "95 % interval", "seeds", "parameters", "GFLOPs an image",
               "training, images/s", "inference, images/s", "peak, GiB"]  # fmt: skip
    return f"{_length_words(costs, trainings)}{markdown(columns, [cells for _, cells in rows])}"


def _length_words(costs: dict[str, Record], trainings: dict[str, dict[int, Record]]) -> str:
    """How long trainings are, which every comparison of them stands on."""
    steps = sorted({row["steps"] for rows in trainings.values() for row in rows.values()})
    batches = sorted({cost["batch_size"] for cost in costs.values() if "batch_size" in cost})
    if not steps:
        return ""
    images = f" of {' or '.join(map(str, batches))} images" if batches else ""
    shown = " or ".join(f"{each:,}" for each in steps)
    return f"{shown} steps{images}; longer trainings may order models otherwise.\n\n"


def _accuracy_cells(values: Sequence[float]) -> list[str]:
    if not values:
        return ["not trained yet", "-", "-", "0"]
    sd, both = spread(values), interval(values)
    shown = "-" if both is None else f"{both[0]:.2f} to {both[1]:.2f}"
    return [f"{fmean(values):.2f}", "-" if sd is None else f"{sd:.2f}", shown, str(len(values))]


def _cost_cells(cost: Record) -> list[str]:
    if not cost:
        return ["-"] * 5
    cells = [f"{cost['parameters']:,}", f"{cost['gflops']:.3f}"]
    if "train_ms" not in cost:
        return [*cells, *["-"] * 3]
    rates = [f"{cost[name]:,.0f}" for name in ("train_images_per_s", "inference_images_per_s")]
    return [*cells, *rates, f"{cost['peak_gib']:.2f}"]


def against_table(*records: Record) -> str:
    """Every model of ours against every baseline, in points of accuracy, paired by seed."""
    found = _against(records)
    baselines = list(dict.fromkeys(rival for _, rival in found))
    rows = [[name_of(ours), *(found[ours, rival] for rival in baselines)]
            for ours in dict.fromkeys(ours for ours, _ in found)]  # fmt: skip
    if not rows:
        return "Nothing to compare yet."
    return markdown(["points against", *map(name_of, baselines)], rows)


def _against(records: Sequence[Record]) -> dict[tuple[str, str], str]:
    _, trainings = joined(records)
    recipes = [recipe for recipe, rows in trainings.items() if rows]
    ours, theirs = ([each for each in recipes if (_family(each) in OURS) is mine] for mine in (True, False))
    pairs = {(one, other): _pairs(trainings[one], trainings[other]) for one in ours for other in theirs}
    sure = {key: each for key, each in pairs.items() if len(each[0]) >= FEWEST}
    outcomes = judged([contrast(*each) for each in sure.values()], higher_is_better=True)
    words = {key: WORDS[each["outcome"]] for key, each in zip(sure, outcomes, strict=True)}
    found = {}
    for key, (mine, rival) in pairs.items():
        if key in sure:
            pair = paired(mine, rival)
            found[key] = f"{words[key]} {pair['difference']:+.2f} ({pair['low']:+.2f} to {pair['high']:+.2f})"
        else:
            found[key] = _bare(mine, rival)
    return found


def _pairs(one: dict[int, Record], other: dict[int, Record]) -> tuple[list[float], list[float]]:
    """Accuracies of the seeds that both have."""
    ours, theirs = accuracies(one), accuracies(other)
    shared = [seed for seed in ours if seed in theirs]
    return [ours[seed] for seed in shared], [theirs[seed] for seed in shared]


def _bare(mine: Sequence[float], rival: Sequence[float]) -> str:
    if not mine:
        return "-"
    difference = fmean(mine) - fmean(rival)
    word = "lower" if difference < 0 else "higher"
    return f"{word} {difference:+.2f} ({len(mine)} seed{'s' if len(mine) > 1 else ''}, no interval)"


def verdict(*records: Record) -> str:
    """Who is best, and how the best of ours stands to ResNet-18 and to every other baseline, in sentences."""
    costs, trainings = joined(records)
    means = {recipe: fmean(accuracies(rows).values()) for recipe, rows in trainings.items() if rows}
    ours = {recipe: mean for recipe, mean in means.items() if _family(recipe) in OURS}
    if not ours or len(means) == len(ours):
        return "No verdict yet: there is no model of ours, or no baseline, that is trained."
    best, first = max(ours, key=lambda each: ours[each]), max(means, key=lambda each: means[each])
    lines = [
        f"- Highest: {name_of(first)}, {means[first]:.2f} %. The best of ours: {name_of(best)}, {ours[best]:.2f} %."
    ]
    for rival, mean in sorted(means.items(), key=lambda item: -item[1]):
        if _family(rival) not in OURS:
            text = _against(records)[best, rival].replace("**", "")
            cost = _cost_words(costs.get(best, {}), costs.get(rival, {}))
            lines.append(f"- {name_of(best)} against {name_of(rival)} ({mean:.2f} %): {text} points{cost}.")
    return "\n".join(lines)


def _cost_words(ours: Record, theirs: Record) -> str:
    """How a step's rate and memory stand, a loss said as one."""
    if "train_ms" not in ours or "train_ms" not in theirs:
        return ""
    speed, memory = theirs["train_ms"] / ours["train_ms"], ours["peak_gib"] / theirs["peak_gib"]
    rate = f"{speed:.2f} times the images a second" if speed >= 1 else f"**{1 / speed:.1f} times as slow** in training"
    held = f"{memory:.2f} times the memory" if memory <= 1 else f"**{memory:.1f} times the memory**"
    return f"; {rate}, {held}"


def transfer_table(record: Record) -> str:
    """Test accuracy from scratch and with a backbone, and the gain with its interval."""
    backbones = [row for row in record["trainings"] if row["way"] == "backbone"]
    shown = ", ".join(f"{NAMES[row['model']]} {100 * row['test']['top1']:.2f} % ({row['parameters']:,} parameters)"
                      for row in backbones)  # fmt: skip
    rows = []
    for row in record["gains"]:
        low, high, gain, scratch, mean = (100 * row[name] for name in ("low", "high", "difference", "scratch", "mean"))
        cells = [NAMES[row["model"]], str(row["per_class"]), row["way"], f"{scratch:.2f}", f"{mean:.2f}"]
        rows.append([*cells, f"{gain:+.2f}", f"{low:+.2f} to {high:+.2f}", _gain_word(row)])
    columns = ["model", "images a class", "way", "from scratch, %", "with the backbone, %", "gain, points",
               "95 % interval", ""]  # fmt: skip
    table = markdown(columns, rows, left=3) if rows else "No gain is known yet: not all seeds are trained."
    missing = len(record["not_begun"])
    note = f" {missing} trainings were not begun within the time." if missing else ""
    steps = f"{record['plan']['steps']:,} steps of {record['plan']['batch']} images"
    later = f"{record['plan']['target_steps']:,} of {record['plan']['target_batch']}"
    head = f"Plan: {record['plan']['name']}; {steps} on CIFAR-10-JPEG, {later} on UC Merced.{note}"
    return f"{head} Backbones on CIFAR-10-JPEG's test part: {shown or 'none yet'}.\n\n{table}"


def _gain_word(row: Record) -> str:
    if row["low"] > 0:
        return "helps"
    return "**harms**" if row["high"] < 0 else "no difference that these seeds show"


def stability_table(record: Record) -> str:
    """Every width in both precisions: whether all stayed finite, and the loss."""
    by_model: dict[str, dict[str, Record]] = defaultdict(dict)
    for row in record["rows"]:
        by_model[row["model"]][row["precision"]] = row
    rows = []
    for model, found in sorted(by_model.items()):
        any_row = next(iter(found.values()))
        cells = [model, f"{any_row['parameters']:,}" if "parameters" in any_row else "-"]
        rows.append([*cells, *(_stable(found.get(precision)) for precision in ("bf16", "fp16"))])
    stable = sum(bool(row["stable"]) for row in record["rows"])
    begun, wanted = record.get("begun, of all", [len(record["rows"]), len(record["rows"])])
    steps = max((row["steps"] for row in record["rows"] if "steps" in row), default=0)
    head = f"{stable} of {wanted} trainings of {steps} steps are stable; {wanted - begun} have no result."
    return f"{head}\n\n{markdown(['model', 'parameters', 'bfloat16', 'float16'], rows, left=1)}"


def _stable(row: Record | None) -> str:
    if row is None:
        return "not run"
    if "problem" in row:
        return f"did not run: {row['problem']}"
    loss = f"loss {row['first loss']:.2f} to {row['last loss']:.2f}"
    if not row["stable"]:
        first = row["first step that is not finite"]
        why = (
            f"not finite from step {first} on" if first is not None else f"{row['skipped by the scaler']} steps skipped"
        )
        return f"**not stable**: {why}"
    skipped = f", {row['skipped by the scaler']} skipped" if row["precision"] == "fp16" else ""
    return f"stable, {loss}{skipped}"


def kernels_by_case(records: Sequence[Record]) -> dict[tuple[str, int], Record]:
    """Rows of training against other kernels by model and images of a step: of alike ones the fullest, then latest."""
    found: dict[tuple[str, int], Record] = {}
    for record in sorted(records, key=lambda each: each["date"]):
        for row in record.get("training", {}).get("rows", ()):
            case = row["model"], row["batch"]
            if len(row) >= len(found.get(case, ())):
                found[case] = row
    return found


def trainings_table(*records: Record) -> str:
    """Training against other kernels, from records of one model each."""
    rows = [row for _, row in sorted(kernels_by_case(records).items()) if "eager" in row or "compiled" in row]
    return training_table({"training": {"rows": rows}}) if rows else "Nothing is timed yet."


def attention_words(record: Record) -> str:
    """The claim of Vision Mamba's paper beside what was measured at its size."""
    claim = record["attention"]["claim"]
    lines = []
    for row in record["attention"]["rows"]:
        if row["pixels"] != claim["pixels"]:
            continue
        for way in ("eager", "compiled"):
            for kind, found in row.get(way, {}).items():
                ours = found.get("vim_tiny", {})
                for rival, each in found.items():
                    if rival != "vim_tiny" and "wall_ms" in each and "wall_ms" in ours:
                        speed = each["wall_ms"]["median"] / ours["wall_ms"]["median"]
                        memory = 1 - ours["peak_bytes"] / each["peak_bytes"]
                        less = f"{memory:.1%} less" if memory >= 0 else f"{-memory:.1%} more"
                        word = "times as fast as" if speed >= 1 else "times as fast as (**slower than**)"
                        lines.append(f"- {kind}, {way}: Vim-T is {speed:.2f} {word} {rival}, with {less} peak memory.")
                    elif rival != "vim_tiny" and "problem" in each:
                        lines.append(f"- {kind}, {way}: {rival} {each['problem']}.")
    head = (f"Claimed at {claim['pixels']} px ({claim['source']}): {claim['times as fast']} times as fast, "
            f"{claim['less memory']:.1%} less memory. Measured:")  # fmt: skip
    return "\n".join([head, "", *(lines or ["- Not measured at this size yet."])])


def sources(*records: Record) -> str:
    """Command, date and machine of every record."""
    lines = []
    for record in sorted(records, key=lambda each: each["date"]):
        facts = record.get("environment", record)
        hardware = facts["hardware"]
        where = (hardware["gpus"] or [hardware["processor"]])[0]
        lines.append(f"- `{record['command']}`, {record['date'][:10]}, {where}, PyTorch {facts['versions']['torch']}")
    return "\n".join(lines)
