"""The words that the command line's options choose from."""

from enum import StrEnum


class Sort(StrEnum):
    """What can be listed."""

    models = "models"
    data = "data"
    tasks = "tasks"
    recipes = "recipes"
    studies = "studies"


class Match(StrEnum):
    """What of a model is turned to meet a budget."""

    width = "width"
    depth = "depth"


class Split(StrEnum):
    """Where training ends and testing begins."""

    auto = "auto"
    ett = "ett"
    ratio = "ratio"
    last = "last"


class DataAction(StrEnum):
    """What can be done with public sets, and with shards."""

    list = "list"
    get = "get"
    check = "check"
    shards = "shards"


class Benchmark(StrEnum):
    """What can be timed, and what is made from the records."""

    scan = "scan"
    lengths = "lengths"
    block = "block"
    cross = "cross"
    block_parts = "block_parts"
    stack = "stack"
    stream = "stream"
    model = "model"
    start = "start"
    vision = "vision"
    plot = "plot"
    tables = "tables"


class Stamps(StrEnum):
    """How rows get their place in time."""

    check = "check"
    order = "order"


class Part(StrEnum):
    """A part of the data."""

    train = "train"
    val = "val"
    test = "test"
