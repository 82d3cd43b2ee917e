"""Several processes of one training, one of which may fail at a chosen moment."""

import contextlib
import json
import os
import resource
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from selectra.spec import Optim, Parallel, Run, Spec
from selectra.spec import Train as TrainSection
from selectra.tasks import Forecasting
from selectra.train.loop import fit
from selectra.train.parallel import joined
from tests.ops import split as _split  # noqa: F401
from tests.train.tiny import TinyModel, windows

# Processes are copies of one that has loaded all this, not new ones that load it each. There is one for all tests, and
# the last list counts: `split`, which is imported above, has a shorter one.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.ops.split", "tests.train.processes", "tests.train.trainings", "selectra.mixers", "selectra.models",
     "selectra.train.snapshots", "torch.distributed.fsdp"]
)  # fmt: skip


class Failing(TinyModel):
    """Does something at its n-th forward pass in training."""

    def __init__(self, dropout: float, at: int, act: Callable[[], Any] | None) -> None:
        super().__init__(dropout)
        self.at, self.act, self.passes = at, act, 0

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        self.passes += self.training
        if self.act is not None and self.training and self.passes == self.at:
            self.act()
        return super().forward(x, **options)


ACTS: dict[str, Callable[[Path], Any]] = {
    "term": lambda out: os.kill(os.getpid(), signal.SIGTERM),
    "dies": lambda out: os._exit(1),
    "stalls": lambda out: time.sleep(600),
    "limits": lambda out: resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)),
    "fills": lambda out: fill(out.with_name("filler")),
}


def fill(path: Path) -> None:
    """Write until there is no room."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(512)):
            pass


def run_of(kind: Any, timeout: float, **settings: Any) -> Run:
    """Twelve steps; the last batch of a pass, of 2, is smaller than some numbers of processes."""
    words: dict[str, Any] = {"steps": 12, "batch_size": 9, "eval_every": 4, "device": "cpu", **settings}
    return Run(
        model=Spec("tiny"), data=Spec("tiny"), task=Spec("tiny"), optim=Optim(lr=1e-2, warmup_steps=3),
        train=TrainSection(**words), parallel=Parallel(kind=kind, timeout=timeout), name="tiny",
    )  # fmt: skip


def train(out: Path, run: Run, dropout: float, at: int = 0, act: str = "") -> None:
    """Train in this process; 65 windows in batches of nine."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with joined(run.parallel, "cpu") as world:
        model = Failing(dropout, at, partial(ACTS[act], out) if act else None)
        fit(model, Forecasting(), windows(65), windows(30, 65), run, out, progress=False, world=world)


def _one(out: Path, run: Run, dropout: float, at: int, act: str) -> dict[str, Any]:
    found: dict[str, Any] = {"error": "", "text": ""}
    try:
        # The last one fails.
        train(out, run, dropout, at, act if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1) else "")
    except (RuntimeError, ValueError) as error:
        found = {"error": type(error).__name__, "text": str(error)}
    return {**found, "at": time.time()}


def together(
    n: int, out: Path, run: Run, dropout: float = 0.0, at: int = 0, act: str = "", wait: float = 150.0
) -> list[dict[str, Any] | None]:
    """Of each of n processes, in order of rank: an error's name and text, and when; None where one is gone."""
    # One that stalls is not waited for.
    return spawned(n, _one, out, run, dropout, at, act, wait=wait, awaited=n - 1 if act == "stalls" else n)


def _start(rank: int, n: int, port: int, said: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    torch.use_deterministic_algorithms(True, warn_only=True)
    (said / f"{rank}.json").write_text(json.dumps(work(*args)))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def spawned(n: int, work: Callable[..., Any], *args: Any, wait: float = 150.0, awaited: int | None = None) -> list[Any]:
    """What `work(*args)` gives in each of n processes, in order of rank; None where one is gone.

    Args:
        awaited: How many of them, the first ones, are waited for.
    """
    with tempfile.TemporaryDirectory() as text:
        said, port = Path(text), free_port()
        processes = [CONTEXT.Process(target=_start, args=(rank, n, port, said, work, args)) for rank in range(n)]
        for process in processes:
            process.start()
        end = time.monotonic() + wait
        for process in processes[:awaited]:
            process.join(max(end - time.monotonic(), 0.1))
        for process in processes:
            process.kill()
            process.join()
        files = [said / f"{rank}.json" for rank in range(n)]
        return [json.loads(file.read_text()) if file.is_file() else None for file in files]


def life(out: Path) -> None:
    """One life of a process of a training: the first one of the last process ends in the middle."""
    mark = out / "ended"
    fails = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1 and not mark.exists()
    if fails:
        mark.touch()
    train(out, run_of("ddp", 30, save_every=2), 0.0, at=7, act="dies" if fails else "")


def agent(rank: int, hosts: int, port: int, out: Path) -> None:
    """What `torchrun --nnodes HOSTS --nproc-per-node 2/HOSTS --max-restarts 1` does on one host."""
    settings = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if hosts > 1 else {}
    os.environ |= settings
    config = LaunchConfig(
        hosts, hosts, 2 // hosts, run_id="training", rdzv_backend="c10d", rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"is_host": rank == 0, "timeout": 60}, max_restarts=1, monitor_interval=0.1, start_method="fork",
    )  # fmt: skip
    elastic_launch(config, life)(out)


def on_hosts(hosts: int, out: Path, wait: float = 120.0) -> list[int | None]:
    """How the agents of so many hosts ended, which train `life` in two processes."""
    port = free_port()
    agents = [CONTEXT.Process(target=agent, args=(rank, hosts, port, out)) for rank in range(hosts)]
    for each in agents:
        each.start()
    end = time.monotonic() + wait
    for each in agents:
        each.join(max(end - time.monotonic(), 0.1))
    ended = [each.exitcode for each in agents]
    for each in agents:
        each.kill()
    return ended
