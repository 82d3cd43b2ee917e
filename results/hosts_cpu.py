"""A training on two hosts beside that of one process: `python results/hosts_cpu.py --out results` (Linux).

The hosts are network namespaces of this machine, joined by a pair of virtual Ethernet devices: each has a name, an
address and a loopback device of its own, and reaches the other by its address alone; they share the disk, as hosts of
a cluster do. `unshare` makes them for this script, which needs `ip`, `mount`, `hostname` and `nsenter`, no more rights
than a user's where these may make namespaces, and leaves nothing: they end with their last process. On both hosts the
command is that of docs/scaling.md. Three trainings: one that nothing disturbs; one in which a process of the second
host is killed, so that `--max-restarts` starts all again; and one in which the second host is lost, launcher and all,
and comes back. Differences are relative to the losses of one process; the record is written after every training.
"""

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from ranks_cpu import compared, run_of, trained
from rich.console import Console

from selectra.train.record import environment

NAMES, ADDRESSES, PORT = ("host0", "host1"), ("10.77.0.1", "10.77.0.2"), 29500
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# Asks for all that this needs, and no more.
APART = ["unshare", "--net", "--uts", "--mount"]
INSIDE = "SELECTRA_INSIDE_OF_HOSTS"
console = Console(width=150)


class Host:
    """A network namespace with a name and an address; the first is this process's own.

    Args:
        number: 0 or 1.
        holder: A process that lives in it.
    """

    def __init__(self, number: int, holder: int | None) -> None:
        self.number = number
        self.enter = [] if holder is None else ["nsenter", "-t", str(holder), "-n", "-u", "-m", "--wd"]

    def call(self, *words: str) -> None:
        """Run a command there."""
        subprocess.run([*self.enter, *words], check=True, timeout=60)

    def launch(self, run: Path, each: int) -> subprocess.Popen[bytes]:
        """Start torchrun there."""
        words = [
            "--nnodes", "2", "--node-rank", str(self.number), "--nproc-per-node", str(each), "--max-restarts", "3",
            "--rdzv-id", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{NAMES[0]}:{PORT}",
            "-m", "selectra", "train", str(run), "parallel.kind=ddp", "parallel.timeout=60",
        ]  # fmt: skip
        settings = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        with (run.parent / f"{NAMES[self.number]}.txt").open("ab") as log:
            return subprocess.Popen([*self.enter, *TORCHRUN, *words], env=settings, stdout=log, stderr=log)


def two_hosts(folder: Path) -> tuple[Host, Host, subprocess.Popen[bytes]]:
    """Both, joined; and the process that keeps the second one, which ends when this one does and its input with it."""
    holder = subprocess.Popen([*APART, "sh", "-c", "echo; cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    # It is there.
    holder.stdout.readline()
    hosts = Host(0, None), Host(1, holder.pid)
    names = folder / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True)))
    hosts[0].call("ip", "link", "add", "wire0", "type", "veth", "peer", "name", "wire1", "netns", str(holder.pid))
    for host, name, address in zip(hosts, NAMES, ADDRESSES, strict=True):
        host.call("mount", "--bind", str(names), "/etc/hosts")
        host.call("hostname", name)
        host.call("ip", "address", "add", f"{address}/24", "dev", f"wire{host.number}")
        for device in ("lo", f"wire{host.number}"):
            host.call("ip", "link", "set", device, "up")
    return *hosts, holder


def _children(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(word) for word in text.split()]


def steps_done(out: Path) -> int:
    """Steps that the record holds."""
    record = out / "record.jsonl"
    return record.read_text().count('"event": "step"') if record.is_file() else 0


def on_both(
    hosts: tuple[Host, Host], run: Path, each: int, disturb: Callable[[list[Any]], None] | None, at: int
) -> list[dict[str, Any]]:
    """The record of a training; something is done to its launchers when so many steps are done."""
    launchers = [host.launch(run, each) for host in hosts]
    end = time.monotonic() + 900
    try:
        while any(launcher.poll() is None for launcher in launchers):
            if time.monotonic() > end:
                raise TimeoutError(f"two hosts did not end within 900 s; their outputs are in {run.parent}")
            if disturb is not None and steps_done(run.parent) >= at:
                disturb(launchers)
                disturb = None
            time.sleep(0.02)
    finally:
        for launcher in launchers:
            launcher.kill()
    if any(launcher.returncode for launcher in launchers):
        said = "\n".join((run.parent / f"{name}.txt").read_text()[-3000:] for name in NAMES)
        raise RuntimeError(f"the launchers ended with {[each.returncode for each in launchers]}: {said}")
    assert disturb is None
    return [json.loads(line) for line in (run.parent / "record.jsonl").read_text().splitlines()]


def main(
    out: Annotated[Path, typer.Option(help="Folder of the record.")],
    steps: Annotated[int, typer.Option(help="Of each training.")] = 50,
    each: Annotated[int, typer.Option(help="Processes of each host.")] = 2,
    task: Annotated[str, typer.Option(help="One of those of ranks_cpu.py.")] = "forecasting",
) -> None:
    """Train, disturb, compare, print and write."""
    if INSIDE not in os.environ:
        # With the first process of their namespace all end, however this ends.
        words = [*APART, "--map-root-user", "--pid", "--mount-proc", "--kill-child", "--fork", sys.executable]
        os.execvpe(words[0], [*words, *sys.argv], {**os.environ, INSIDE: "1"})
    run = run_of(task, steps)
    run = run.model_copy(update={"train": run.train.model_copy(update={"save_every": 5})})
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    record: dict[str, Any] = {
        "command": f"python results/hosts_cpu.py --steps {steps} --each {each} --task {task} --out {out.name}",
        "date": date, **environment(), "target": 1e-6, "hosts": dict(zip(NAMES, ADDRESSES, strict=True)),
        "trainings": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        one = trained(run, 1, "none", folder / "one")
        *hosts, holder = two_hosts(folder)

        def kill_one(launchers: list[Any]) -> None:
            os.kill(_children(launchers[1].pid)[0], signal.SIGKILL)

        def lose_host(launchers: list[Any]) -> None:
            for process in [launchers[1].pid, *_children(launchers[1].pid)]:
                os.kill(process, signal.SIGKILL)
            launchers[1].wait()
            launchers[1] = hosts[1].launch(path, each)

        for name, disturb in (("undisturbed", None), ("a process killed", kill_one), ("a host lost", lose_host)):
            path = folder / name / "run.json"
            path.parent.mkdir()
            path.write_text(run.to_json())
            began = time.monotonic()
            more = on_both((hosts[0], hosts[1]), path, each, disturb, steps // 3)
            row = compared(one, more)
            row |= {"resumed": sum(line["event"] == "resumed" for line in more), "seconds": time.monotonic() - began}
            row["within target"] = row["loss"] <= record["target"] and row["resumed"] == (disturb is not None)
            record["trainings"][name] = row
            out.mkdir(parents=True, exist_ok=True)
            (out / f"hosts_cpu_{date}.json").write_text(json.dumps(record, indent=1) + "\n")
            console.print(name, row)
        holder.kill()


if __name__ == "__main__":
    typer.run(main)
