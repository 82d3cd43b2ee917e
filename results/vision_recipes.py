"""Try changes to the CIFAR-10-JPEG recipe on validation images; the test part stays shut.

    python results/vision_recipes.py VARIANTS --seconds 150 --packed 3

finds the images through SELECTRA_DATA. Every line of the file VARIANTS is a model and changes as `selectra train` takes
them, such as `resnet18 train.steps=3200 train.batch_size=256`. A tenth of the training images is for validation: the
score of the running mean of the weights after each quarter of the steps, and that of the last weights, are printed.
"""

import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from selectra.compare.packed_images import Job, Library, Training, work_packed
from selectra.compare.vision import find_run
from selectra.train.record import environment


def main(
    variants: Path,
    seconds: Annotated[float, typer.Option(help="Nothing is begun after these.")] = 600.0,
    packed: Annotated[int, typer.Option(help="Trainings side by side.")] = 3,
) -> None:
    """Train every variant and print what it came to."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    began, device = time.monotonic(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = environment()
    print(" ".join(sys.argv), facts["hardware"], facts["versions"])  # noqa: T201
    left = [line.split() for line in variants.read_text().splitlines() if line.strip()]

    def take() -> Job | None:
        if not left:
            return None
        model, *changes = left.pop(0)
        run = find_run(f"{model}_cifar10", 0, ["data.val=0.1", *changes])
        steps = run.train.steps or 1
        quarters = run.train.model_copy(update={"eval_every": max(1, steps // 4)})
        return Job(" ".join((model, *changes)), run.model_copy(update={"train": quarters}))

    def done(training: Training) -> None:
        end, parts = training.on_device, training.parts
        last = training.measure(parts.val, end.model)["top1"]
        scores = ", ".join(f"{100 * found['top1']:.2f}" for found in training.history)
        print(  # noqa: T201
            f"{time.monotonic() - began:.1f} {training.job.key}: {scores} %, last weights {100 * last:.2f} %, "
            f"loss {float(end.losses[-50:].mean()):.3f}, {end.seconds:.1f} s",
            flush=True,
        )

    work_packed(Library(device), packed, take, done, began + seconds)
    print("not begun:", [" ".join(words) for words in left])  # noqa: T201


if __name__ == "__main__":
    typer.run(main)
