"""What scan orders in 2D are worth: VMamba's four routes, two, and one (arXiv:2401.10166, Table 7)."""

from selectra.compare.study import Budget, Study, Tuning, Variant
from selectra.recipes.studies.shared import TUNED, shapes
from selectra.registry import studies
from selectra.spec import Spec

ROUTES = {
    "four routes": ("right", "down", "left", "up"), "rows and columns": ("right", "down"),
    "rows both ways": ("right", "left"), "rows one way": ("right",),
}  # fmt: skip


@studies.register("scan_orders", kind="image", source="arXiv:2401.10166")
def scan_orders() -> Study:
    """Do images need scans along four routes, both axes and both ways?

    20 trainings of 1,000 steps; of 600 steps on CIFAR-10-JPEG, five side by side on an H200: 2 min 26 s.
    Widths make up for the parameters of routes that are left out.
    """
    whole = Spec("vmamba_tiny_s1l8", stem="patches", patch_size=2, dims=(64, 128, 256), depths=(2, 2, 2))
    return Study(
        name="scan_orders",
        question="Do images need scans along four routes?",
        bases=(shapes(),),
        variants=tuple(Variant(name=name, model=whole.replace(routes=routes)) for name, routes in ROUTES.items()),
        subject="four routes",
        subject_title="scanning along four routes",
        declared=TUNED,
        tuning=Tuning(values={"optim.lr": (1e-3, 3e-3)}),
        budget=Budget(quantity="params", amount=2_200_000),
        metric="top1",
        higher_is_better=True,
    )
