"""One long sequence through a Mamba on one GPU and split over two: `python results/length_parallel_gpu.py --out DIR`.

The target: 1,048,576 tokens through 24 Mamba blocks of width 768 in bfloat16, every block computed again during
backward, loss over all tokens, forward and backward; on two GPUs at least 1.8 times as fast, and half of the memory in
each. Weights are random and float32, under autocast; the embedding and with it the residual stream are bfloat16, tokens
are bytes (a vocabulary of 256). One GPU keeps 3 GiB a block, some 110 GiB in all by a count of tensors: an H200. Every
number of GPUs runs in fresh processes: one pass that is not counted, which compiles kernels, then `--passes` that are
timed by the host's clock between two synchronised points, the slowest process's time, and each one's highest memory;
loss and gradients are set beside those of one GPU. The record is written after each.

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


def one_pass(model: MambaLM, length: Link, sizes: dict[str, Any], device: torch.device) -> Tensor:
    """Forward and backward of the mean loss over all tokens; the loss, of the whole sequence."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (1, sizes["tokens"] + 1), generator=generator)
    inputs, targets = (length.chunk(x).to(device) for x in (tokens[:, :-1], tokens[:, 1:]))
    with torch.autocast(device.type, torch.bfloat16, enabled=sizes["bf16"]):
        logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / sizes["tokens"]
    loss.backward()
    length.sum_gradients(model.parameters())
    return length.sum_(loss.detach().clone()) if length.size > 1 else loss.detach()


def worker(rank: int, n: int, folder: str, sizes: dict[str, Any], kind: str) -> None:
    """One process: times of its passes, its loss, its gradients' norm and its memory."""
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
    found: dict[str, Any] = {"seconds": [], "losses": []}
    with length_parallel(timeout=100) as length, recomputed(model, True):
        for index in range(sizes["passes"] + 1):
            model.zero_grad(set_to_none=True)
            if kind == "cuda":
                torch.cuda.synchronize()
            distributed.barrier()
            start = time.perf_counter()
            loss = one_pass(model, length, sizes, device)
            if kind == "cuda":
                torch.cuda.synchronize()
            if index:
                found["seconds"].append(time.perf_counter() - start)
            found["losses"].append(float(loss))
    found["gradient norm"] = float(
        torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    )
    if kind == "cuda":
        found["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def measured(n: int, sizes: dict[str, Any], device: str) -> dict[str, Any]:
    """One row of the record."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            start_processes(worker, (n, folder, sizes, device), n, start_method="spawn")
        except (ProcessRaisedException, ProcessExitedException) as error:
            return {"processes": n, "problem": str(error).strip().splitlines()[-1]}
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(n)]
    slowest = [max(times) for times in zip(*(one["seconds"] for one in found), strict=True)]
    row = {"processes": n, "seconds": slowest, "median seconds": statistics.median(slowest)}
    return row | {"loss": found[0]["losses"][0], "gradient norm": found[0]["gradient norm"], "each": found}


def compared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """More processes against one."""
    one, found = next((row for row in rows if row["processes"] == 1 and "problem" not in row), None), {}
    for row in rows if one is not None else ():
        assert one is not None
        if row is one or "problem" in row:
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
    most: Annotated[int, typer.Option(help="Processes; 1, 2, 4, ... up to this are measured.")] = 2,
    bf16: Annotated[bool, typer.Option(help="Whether products and activations are bfloat16.")] = True,
) -> None:
    """Measure, print and write."""
    sizes = {"tokens": tokens, "depth": depth, "d_model": d_model, "passes": passes, "bf16": bf16}
    command = f"python results/length_parallel_gpu.py --device {device} --tokens {tokens} --depth {depth}"
    command += (
        f" --d-model {d_model} --passes {passes} --most {most} {'--bf16' if bf16 else '--no-bf16'} --out {out.name}"
    )
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    record: dict[str, Any] = {"command": command, "date": date, **environment(), **sizes, "rows": []}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"length_parallel_{device}_{date}.json"
    n = 1
    while n <= most:
        record["rows"].append(measured(n, sizes, device))
        record["against one"] = compared(record["rows"])
        path.write_text(json.dumps(record, indent=1) + "\n")
        console.print({key: value for key, value in record["rows"][-1].items() if key != "each"})
        n *= 2
    console.print(record["against one"], f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
