"""One long sequence through a Mamba on one GPU and split over two: `python results/length_parallel_gpu.py --out DIR`.

The target: 1,048,576 tokens through 24 Mamba blocks of width 768 in bfloat16, every block computed again during
backward, loss over all tokens, forward and backward; on two GPUs at least 1.8 times as fast, and half of the memory in
each. Weights are random and float32, under autocast; the embedding and with it the residual stream are bfloat16, tokens
are bytes (a vocabulary of 256). One GPU keeps 3 GiB a block, some 110 GiB in all by a count of tensors: an H200. Every
number of GPUs runs in fresh processes: one pass that is not counted, which compiles kernels, then `--passes` that are
timed by the host's clock between two synchronised points, the slowest process's time, and each one's highest memory;
loss and gradients are set beside those of one GPU. Tokens lie on the device before. Then, on GPUs, one more pass under
the profiler says where the time goes, and with several a small model in float32, its sequence split over them, is held
to one GPU's logits and gradients. The record is written after each number.

A rehearsal on a CPU, with gloo: `python results/length_parallel_gpu.py --device cpu --tokens 4096 --depth 2
--d-model 32 --out DIR`. docs/scaling.md says how programs start on a cluster.
"""

import datetime
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gpu_shares import shares
from rich.console import Console
from torch import Tensor, distributed
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes
from torch.nn import functional as F

from selectra import length_parallel
from selectra.models import MambaLM
from selectra.ops.length_parallel import Link
from selectra.train.parallel import recomputed
from selectra.train.record import environment

VOCABULARY = 256
# Of the first process, on the terminal.
SHOWN = ("until the host was done", "GiB", "shares", "a small model in float32 against one")
console = Console(width=150)


def model_of(sizes: dict[str, Any], device: torch.device) -> MambaLM:
    """The same weights in every process."""
    torch.manual_seed(0)
    model = MambaLM(vocab_size=VOCABULARY, d_model=sizes["d_model"], depth=sizes["depth"], residual_in_fp32=False).to(
        device
    )
    if sizes["bf16"]:
        # The stream has the embedding's type.
        model.embedding.to(torch.bfloat16)
    return model


def batch_of(length: Link, sizes: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """This process's part of the tokens and of those to come."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (1, sizes["tokens"] + 1), generator=generator)
    inputs, targets = (length.chunk(x).contiguous().to(device) for x in (tokens[:, :-1], tokens[:, 1:]))
    return inputs, targets


def one_pass(
    model: MambaLM, length: Link, batch: tuple[Tensor, Tensor], sizes: dict[str, Any]
) -> tuple[Tensor, Tensor, float]:
    """Forward and backward of the mean loss over all tokens; logits, the loss of the whole sequence, host's seconds."""
    inputs, targets = batch
    start = time.perf_counter()
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=sizes["bf16"]):
        logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / sizes["tokens"]
    loss.backward()
    host = time.perf_counter() - start
    length.sum_gradients(model.parameters())
    total = length.sum_(loss.detach().clone()) if length.size > 1 else loss.detach()
    return logits.detach(), total, host


def timed(model: MambaLM, length: Link, sizes: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Times of the passes, what the host took of them, loss, gradients' norm, memory and where the time went."""
    found: dict[str, Any] = {"seconds": [], "until the host was done": [], "losses": []}
    batch = batch_of(length, sizes, device)

    def synchronised() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for index in range(sizes["passes"] + 1):
        model.zero_grad(set_to_none=True)
        synchronised()
        distributed.barrier()
        start = synchronised()
        logits, loss, host = one_pass(model, length, batch, sizes)
        seconds = synchronised() - start
        del logits
        if index:
            found["seconds"].append(seconds)
            found["until the host was done"].append(host)
        found["losses"].append(float(loss))
    found["gradient norm"] = float(
        torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    )
    if device.type == "cuda":
        found["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def checked(group_of_one: Any, tokens: int, device: torch.device) -> dict[str, Any]:
    """A small model in float32 over all processes against the same in this one alone: relative to the largest value."""
    sizes = {"tokens": tokens, "depth": 2, "d_model": 128, "bf16": False}
    results = []
    for group in (None, group_of_one):
        model = model_of(sizes, device)
        with length_parallel(group, timeout=60) as length, recomputed(model, True):
            logits, loss, _ = one_pass(model, length, batch_of(length, sizes, device), sizes)
            part = distributed.get_rank() if length.size == 1 else None
        wide = logits if part is None else logits.tensor_split(distributed.get_world_size(), 1)[part]
        results.append((wide, loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (logits, loss, grads), (of_logits, of_loss, of_grads) = results

    def apart(x: Tensor, truth: Tensor) -> float:
        return float((x - truth).abs().max() / truth.abs().max())

    worst = max(of_grads, key=lambda name: apart(grads[name], of_grads[name]))
    found = {"tokens": tokens, "logits": apart(logits, of_logits), "loss": apart(loss, of_loss)}
    return found | {"worst gradient": apart(grads[worst], of_grads[worst]), "of": worst}


def worker(rank: int, n: int, folder: str, sizes: dict[str, Any], kind: str) -> None:
    """One process."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    # Without multicast memory of the switch, which some hosts do not offer.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    distributed.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=n, timeout=datetime.timedelta(seconds=120)
    )
    model = model_of(sizes, device)
    path = Path(folder, f"{rank}.json")
    with length_parallel(timeout=100) as length, recomputed(model, True):
        found = timed(model, length, sizes, device)
        path.write_text(json.dumps(found))
        if kind == "cuda" and not sizes["only_times"]:
            model.zero_grad(set_to_none=True)
            batch = batch_of(length, sizes, device)
            distributed.barrier()
            found["shares"] = shares(lambda: one_pass(model, length, batch, sizes))
            path.write_text(json.dumps(found))
    if n > 1 and not sizes["only_times"]:
        alone = [distributed.new_group([i]) for i in range(n)][rank]
        check = checked(alone, min(40_000, sizes["tokens"]), device)
        path.write_text(json.dumps(found | {"a small model in float32 against one": check}))
    distributed.destroy_process_group()


def measured(n: int, sizes: dict[str, Any], device: str) -> dict[str, Any]:
    """One row of the record."""
    row: dict[str, Any] = {"processes": n}
    with tempfile.TemporaryDirectory() as folder:
        try:
            start_processes(worker, (n, folder, sizes, device), n, start_method="spawn")
        except (ProcessRaisedException, ProcessExitedException) as error:
            row["problem"] = str(error).strip()[-2000:]
        paths = [Path(folder, f"{rank}.json") for rank in range(n)]
        if not all(path.exists() for path in paths):
            return row
        found = [json.loads(path.read_text()) for path in paths]
    slowest = [max(times) for times in zip(*(one["seconds"] for one in found), strict=True)]
    row |= {"seconds": slowest, "median seconds": statistics.median(slowest)}
    return row | {"loss": found[0]["losses"][0], "gradient norm": found[0]["gradient norm"], "each": found}


def compared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """More processes against one."""
    one, found = next((row for row in rows if row["processes"] == 1 and "seconds" in row), None), {}
    for row in rows if one is not None else ():
        assert one is not None
        if row is one or "seconds" not in row:
            continue
        against: dict[str, Any] = {"times as fast": one["median seconds"] / row["median seconds"]}
        against["loss differs by"] = abs(row["loss"] - one["loss"]) / abs(one["loss"])
        against["gradient norm differs by"] = abs(row["gradient norm"] / one["gradient norm"] - 1)
        if "GiB" in one["each"][0]:
            against["share of memory"] = max(each["GiB"] for each in row["each"]) / one["each"][0]["GiB"]
        found[str(row["processes"])] = against
    return found


def main(
    out: Annotated[Path, typer.Option(help="Folder of the record.")],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    tokens: Annotated[int, typer.Option(help="Of the one sequence.")] = 2**20,
    depth: Annotated[int, typer.Option(help="Blocks.")] = 24,
    d_model: Annotated[int, typer.Option(help="Width.")] = 768,
    passes: Annotated[int, typer.Option(help="That are timed.")] = 3,
    most: Annotated[int, typer.Option(help="Processes; --least, twice as many, ... up to this are measured.")] = 2,
    least: Annotated[int, typer.Option(help="Processes to begin with; from 1 on all are set beside one.")] = 1,
    bf16: Annotated[bool, typer.Option(help="Whether products and activations are bfloat16.")] = True,
    only_times: Annotated[bool, typer.Option(help="Neither the profiler nor the small model.")] = False,
) -> None:
    """Measure, print and write."""
    sizes = {"tokens": tokens, "depth": depth, "d_model": d_model, "passes": passes, "bf16": bf16}
    sizes["only_times"] = only_times
    command = f"python results/length_parallel_gpu.py --device {device} --tokens {tokens} --depth {depth}"
    command += (
        f" --d-model {d_model} --passes {passes} --most {most} --least {least} {'--bf16' if bf16 else '--no-bf16'}"
        f"{' --only-times' if only_times else ''} --out {out.name}"
    )
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    record: dict[str, Any] = {"command": command, "date": date, **environment(), **sizes, "rows": []}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"length_parallel_{device}_{date}.json"
    n = least
    while n <= most:
        record["rows"].append(measured(n, sizes, device))
        record["against one"] = compared(record["rows"])
        path.write_text(json.dumps(record, indent=1) + "\n")
        first, *_ = record["rows"][-1].get("each", [{}])
        console.print({key: value for key, value in record["rows"][-1].items() if key != "each"})
        console.print({key: first[key] for key in SHOWN if key in first})
        n *= 2
    console.print(record["against one"], f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
