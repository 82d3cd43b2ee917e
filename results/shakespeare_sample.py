"""What a model that `selectra train` has trained writes: one JSON record of the run, its figures and texts.

python results/shakespeare_sample.py runs/shakespeare_small --command "selectra train shakespeare_small" --out FILE
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from selectra.language.checkpoint import from_pretrained
from selectra.language.command import GenerateJob, generate_command
from selectra.train.record import environment

PROMPTS = ("ROMEO:", "First Citizen:\nBefore we")


def figures(folder: Path) -> dict[str, Any]:
    """The best validation metrics of a run, and its time."""
    events = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
    evaluations = [event for event in events if event["event"] == "metrics"]
    best = min(evaluations, key=lambda event: event["loss"])
    steps = [event for event in events if event["event"] == "step"]
    seconds = sum(event["seconds"] for event in (*steps, *evaluations))
    return {
        "steps": len(steps), "seconds": seconds, "best_step": best["step"], "best": {
            name: best[name] for name in ("loss", "perplexity", "accuracy") if name in best
        }, "last_training_loss": steps[-1]["loss"], "started": events[0],
    }  # fmt: skip


def main() -> None:
    """Read the run, let the model write, and keep both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--command", required=True)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--out", type=Path, required=True)
    words = parser.parse_args()
    pretrained = words.folder / "pretrained"
    draws, quiet = {"temperature": words.temperature, "top_k": None, "top_p": None}, Console(quiet=True)
    jobs = [GenerateJob(pretrained, (each,), None, None, words.tokens, draws, (), 0, "cpu", None) for each in PROMPTS]
    texts = [generate_command(job, quiet)[0] for job in jobs]
    record = {
        "what": "a trained language model writes", "command": words.command,
        "generate": f"selectra generate {pretrained} PROMPT --temperature {words.temperature:g} "
                    f"--max-new-tokens {words.tokens}",
        "parameters": sum(each.numel() for each in from_pretrained(pretrained).parameters()), **figures(words.folder),
        "samples": [{"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, texts, strict=True)],
        **environment(),
    }  # fmt: skip
    words.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
