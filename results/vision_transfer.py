"""Does a backbone trained on CIFAR-10-JPEG help on UC Merced with 10 and 80 images a class?

    python results/vision_transfer.py --out results/vision_transfer.json --weights FOLDER --seconds 190

finds both sets through SELECTRA_DATA. Every backbone is trained on CIFAR-10-JPEG at 32 px, then on UC Merced at 64 px
(its images halved, so that a patch covers as many pixels of either) in three ways with the same images, views, steps
and optimizer: the head alone ("frozen"), all weights ("tuned"), and all weights from scratch. The split of UC Merced,
the images that are kept, the head and the order come from the seed, which all three ways share: gains are paired.

What is trained is decided by arithmetic, which stands in the record: SiMBA-S, VMamba-T [s1l8] and ResNet-18 as
published, a position for every 4 px, are measured (or were: `--measured` names an earlier record), and the longest plan
whose steps fit the seconds is taken, else the shortest; with patches of 2 px, which suit small images better, all take
four times as long. The record is written after every part, and the same command goes on with it. `--plan tiny --data
shapes` is a rehearsal for any machine.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from selectra.compare.packed_images import Job, Library, Slot, Training, work_packed
from selectra.compare.stats import contrast, paired
from selectra.compare.vision import find_run, timed
from selectra.registry import models
from selectra.spec import Run, Spec, override
from selectra.train.record import environment

SEEDS, KEPT, WAYS = (0, 1, 2), (10, 80), ("scratch", "frozen", "tuned")
# Of the seconds, what trainings may take by arithmetic; the rest is for building, recording graphs and measuring.
SHARE = 0.75
# A step of the head alone is a forward pass and little more.
COST = {"scratch": 1.0, "tuned": 1.0, "frozen": 0.4}
RECIPES = {"simba": "simba_cifar10", "vmamba": "vmamba_cifar10", "resnet18": "resnet18_cifar10"}


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Args:
        name: For the record.
        models: In place of the recipes' models.
        backbones: Seeds of trainings on CIFAR-10; where there is one, all seeds on UC Merced start from it.
        steps: Of a backbone.
        batch: Images of a step.
        target_steps: On UC Merced.
        target_batch: Images of a step there.
        factor: What a step takes over the published models'.
    """

    name: str
    models: dict[str, Spec]
    backbones: int
    steps: int
    batch: int
    target_steps: int
    target_batch: int
    factor: float = 1.0


FINE = {
    "simba": Spec("simba_small", patch_size=2, drop_path=0.1),
    "vmamba": Spec("vmamba_tiny_s1l8", patch_size=2, drop_path=0.1),
    "resnet18": Spec("resnet_18", stem="small"),
}
PUBLISHED = {
    "simba": Spec("simba_small", drop_path=0.1),
    "vmamba": Spec("vmamba_tiny_s1l8", drop_path=0.1),
    "resnet18": Spec("resnet_18"),
}
SHAPE: dict[str, Any] = {"dims": (8, 16), "depths": (1, 1), "patch_size": 4, "d_state": 2}
TINY = {
    "simba": Spec("simba_smoke", mlp_ratios=(2, 2), **SHAPE),
    "vmamba": Spec("vmamba_smoke", **SHAPE),
    "resnet18": Spec("resnet_smoke"),
}
PLANS = {
    "published, patches of 2 px": Plan("published, patches of 2 px", FINE, 1, 1000, 512, 300, 64, 4.0),
    "published": Plan("published", PUBLISHED, 1, 1500, 512, 400, 64),
    "published, shorter": Plan("published, shorter", PUBLISHED, 1, 1000, 512, 300, 64),
    "published, shortest": Plan("published, shortest", PUBLISHED, 1, 800, 512, 200, 64),
    "tiny": Plan("tiny", TINY, 1, 4, 16, 3, 16),
}
ORDER = ("published, patches of 2 px", "published", "published, shorter", "published, shortest")
MEASURED = "published"


@dataclass(frozen=True)
class Part:
    """One training: a backbone where `way` is "backbone", else one on UC Merced."""

    model: str
    seed: int
    way: str
    per_class: int | None = None

    def source(self, plan: Plan) -> "Part | None":
        """The backbone that it starts from."""
        return None if self.way not in ("frozen", "tuned") else Part(self.model, self.seed % plan.backbones, "backbone")


def parts_of(plan: Plan) -> Iterator[Part]:
    """Backbones first, then seed by seed, so that what a limit cuts off is a whole seed of all models."""
    for seed in SEEDS:
        if seed < plan.backbones:
            yield from (Part(model, seed, "backbone") for model in RECIPES)
        for per_class in KEPT:
            yield from (Part(model, seed, way, per_class) for way in WAYS for model in RECIPES)


class Transfer:
    """The trainings of a plan, their record and their weights."""

    def __init__(self, words: argparse.Namespace, library: Library, record: dict[str, Any]) -> None:
        self.words, self.library, self.record = words, library, record

    def run_of(self, plan: Plan, part: Part) -> Run:
        """A part's run."""
        changes = [
            f"train.steps={plan.steps}",
            f"train.batch_size={plan.batch}",
            f"optim.warmup_steps={plan.steps // 10}",
        ]
        run = find_run(RECIPES[part.model], part.seed, [*changes, f"data.path={self.words.data}"])
        run = run.model_copy(update={"model": models.typed(plan.models.get(part.model, run.model))})
        if part.way == "backbone":
            return run
        views = {"crop": 8, "flip": 0.5, "flip_vertical": 0.5, "erase": 0.25}
        data = Spec("images", path=self.words.target, img_size=64, val=0.0, test=0.2, per_class=part.per_class,
                    split_seed=part.seed, **views)  # fmt: skip
        more = [f"train.steps={plan.target_steps}", f"train.batch_size={plan.target_batch}", "optim.lr=0.001",
                f"optim.warmup_steps={plan.target_steps // 10}", "train.ema=0.99"]  # fmt: skip
        source = part.source(plan)
        if source is not None:
            more += [f"train.pretrained={self.weights(source)}", f"train.freeze={'all' if part.way == 'frozen' else 0}"]
        return override(run.model_copy(update={"data": data}), more)

    def weights(self, part: Part) -> Path:
        """Where a backbone's weights lie."""
        return self.words.weights / f"{self.words.out.stem}_{part.model}_{part.seed}.safetensors"

    def read_all(self) -> None:
        """Read every data set, side by side, since decoding pictures is the host's work."""
        plan = PLANS["tiny"]
        specs = list(dict.fromkeys(self.run_of(plan, part).data for part in parts_of(plan)))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self.library, specs))

    def decide(self, began: float) -> Plan:
        """The first plan whose trainings fit the time, by the measured step of its models alone on the device."""
        if self.words.plan != "auto":
            return PLANS[self.words.plan]
        steps = self.measured()
        left = SHARE * (self.words.seconds - (time.monotonic() - began))
        wanted = {name: seconds_of(PLANS[name], steps) for name in ORDER}
        self.record["decision"] = {"seconds for trainings": left, "steps_ms": steps, "seconds by plan": wanted}
        return PLANS[next((name for name in ORDER if wanted[name] <= left), ORDER[-1])]

    def measured(self) -> dict[str, dict[str, float]]:
        """Milliseconds of a step of every published model, on both sets."""
        if self.words.measured is not None:
            return json.loads(self.words.measured.read_text())["decision"]["steps_ms"]
        steps: dict[str, dict[str, float]] = {"backbone": {}, "scratch": {}}
        for model in RECIPES:
            for part in (Part(model, 0, "backbone"), Part(model, 0, "scratch", KEPT[-1])):
                steps[part.way][model] = self.step_ms(PLANS[MEASURED], part)
        return steps

    def step_ms(self, plan: Plan, part: Part) -> float:
        """Milliseconds of a step, alone on the GPU."""
        slot = Slot(self.library.device)
        training = Training(Job(part, self.run_of(plan, part)), self.library, slot.stream, slot.pool)
        training.begin()
        return 1e3 * timed(training.on_device.step_again, slot, rounds=8)

    def go(self, plan: Plan, until: float) -> None:
        """Train what is left, several at once."""
        done = {(row["model"], row["seed"], row["way"], row["per_class"]) for row in self.record["trainings"]}
        left = [part for part in parts_of(plan) if (part.model, part.seed, part.way, part.per_class) not in done
                or (part.way == "backbone" and not self.weights(part).exists())]  # fmt: skip

        def take() -> Job | None:
            for part in left:
                source = part.source(plan)
                if source is None or (source not in left and self.weights(source).exists()):
                    left.remove(part)
                    return Job(part, self.run_of(plan, part))
            return None

        work_packed(self.library, self.words.packed, take, self.note, until)
        self.record["not_begun"] = [asdict(part) for part in left]
        self.save()

    def note(self, training: Training) -> None:
        """A finished training's row, and a backbone's weights."""
        part, done = training.job.key, training.on_device
        if part.way == "backbone":
            state = {name: tensor.contiguous().cpu() for name, tensor in done.final.state_dict().items()}
            save_file(state, self.weights(part))
        losses = done.losses.cpu()
        row = {
            **asdict(part), "parameters": training.parameters, "steps": done.steps, "images": len(done.held.labels),
            "trained": sum(parameter.numel() for parameter in done.trained),
            "test": training.measure(training.parts.test), "test_images": len(training.parts.test),
            "seconds": done.seconds, "last_loss": float(losses[-20:].mean()), "backends": done.backends,
        }  # fmt: skip
        self.record["trainings"] = [old for old in self.record["trainings"] if not same(old, row)] + [row]
        self.save()
        shown = {name: row[name] for name in ("model", "seed", "way", "per_class", "test", "seconds")}
        print(json.dumps(shown), flush=True)  # noqa: T201

    def save(self) -> None:
        """Write the record, and what follows from it."""
        self.record["gains"] = gains(self.record["trainings"])
        partial = self.words.out.with_suffix(".partial")
        partial.write_text(json.dumps(self.record, indent=1) + "\n")
        partial.replace(self.words.out)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows are of the same part."""
    return all(one[name] == other[name] for name in ("model", "seed", "way", "per_class"))


def seconds_of(plan: Plan, steps: dict[str, dict[str, float]]) -> float:
    """All trainings of a plan, one after the other, from the measured steps, in milliseconds."""
    ways = sum(COST[way] for way in WAYS) * len(KEPT) * len(SEEDS)
    backbones = sum(steps["backbone"].values()) * plan.steps * plan.backbones
    return plan.factor * (backbones + sum(steps["scratch"].values()) * plan.target_steps * ways) / 1e3


def gains(trainings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Test accuracy with the backbone less that from scratch, paired by seed; where all seeds are there."""
    found = []
    for model in RECIPES:
        for per_class in KEPT:
            of = {(row["way"], row["seed"]): row["test"]["top1"] for row in trainings
                  if row["model"] == model and row["per_class"] == per_class}  # fmt: skip
            if any((way, seed) not in of for way in WAYS for seed in SEEDS):
                continue
            scratch = [of["scratch", seed] for seed in SEEDS]
            for way in WAYS[1:]:
                ours = [of[way, seed] for seed in SEEDS]
                pair = paired(ours, scratch)
                row = {name: pair[name] for name in ("mean", "difference", "low", "high", "pairs")}
                found.append({"model": model, "per_class": per_class, "way": way, "scratch": pair["rival"], **row,
                              "p": contrast(ours, scratch)["p"] if min(ours + scratch) > 0 else None})  # fmt: skip
    return found


def read_words() -> argparse.Namespace:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--weights", type=Path, required=True, help="folder for the backbones")
    words.add_argument("--seconds", type=float, default=190.0, help="nothing is begun after these")
    words.add_argument("--packed", type=int, default=3)
    words.add_argument("--measured", type=Path, default=None, help="a record whose steps say what fits")
    words.add_argument("--plan", choices=["auto", *PLANS], default="auto")
    words.add_argument("--data", default="cifar10_jpeg")
    words.add_argument("--target", default="ucmerced")
    return words.parse_args()


def begin(words: argparse.Namespace) -> dict[str, Any]:
    """The record to go on with, or a new one."""
    if words.out.exists():
        return json.loads(words.out.read_text())
    return {
        "what": "vision_transfer", "command": " ".join(sys.argv), "date": datetime.now(UTC).isoformat(),
        **environment(), "data": words.data, "target": words.target, "seeds": list(SEEDS), "plan": None,
        "decision": None, "trainings": [], "gains": [], "not_begun": [], "seconds": 0.0,
    }  # fmt: skip


def main() -> None:
    words, began = read_words(), time.monotonic()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    words.weights.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = begin(words)
    before = record["seconds"]
    transfer = Transfer(words, Library(device), record)
    transfer.read_all()
    print(f"data read after {time.monotonic() - began:.1f} s", flush=True)  # noqa: T201
    if record["plan"] is None:
        plan = transfer.decide(began)
        record["plan"] = {**asdict(plan), "models": {name: spec.to_json() for name, spec in plan.models.items()}}
    plan = PLANS[record["plan"]["name"]]
    print(json.dumps({"plan": plan.name, "decision": record["decision"]}), flush=True)  # noqa: T201
    transfer.go(plan, began + words.seconds)
    record["seconds"] = before + time.monotonic() - began
    transfer.save()
    print(json.dumps(record["gains"], indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
