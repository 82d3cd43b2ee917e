"""Sections on the speed and the memory of generation, from the records of `results/decode_gpu.py` and `jamba_gpu.py`.

Units: milliseconds a token, tokens a second, bytes in binary multiples.
"""

from collections.abc import Iterator, Sequence

from selectra.report.markdown import Row, grid

# Of the time that reading the weights once takes, at the bandwidth of a copy.
MOST_OVER_FLOOR = 1.3
NAMES = {"mamba_lm_1b4": "Mamba, 1.4 B", "gpt_1b3": "Transformer, 1.3 B"}


def decoding(record: Row) -> Iterator[str]:
    """Steps of Mamba beside a Transformer of its size and `transformers`' Mamba."""
    mamba = record["models"]["mamba_lm_1b4"]
    rows = mamba["rows"]
    worst = max(row["over_floor"] for row in rows)
    met = worst <= MOST_OVER_FLOOR
    gigabytes = record["copy_bytes_per_second"] / 1e9
    yield (
        f"**Target {'met' if met else 'missed'}: a token takes {worst:.2f} times as long as reading the weights once "
        f"(at most {MOST_OVER_FLOOR} asked, on an H100; here {record['device']}).** Batch 1, bfloat16, random weights, "
        "one CUDA graph a token; the weights' "
        f"{size(mamba['weight_bytes'])} at the {gigabytes:,.0f} GB/s that a copy reads and writes here take "
        f"{mamba['floor_ms']:.3f} ms. Medians of CUDA events."
    )
    yield _memory(rows)
    table = []
    for name, model in record["models"].items():
        for row in model["rows"]:
            rate = 1e3 / row["ms_per_token"]
            table.append(
                [
                    NAMES.get(name, name), f"{row['context']:,}", f"{row['ms_per_token']:.3f}", f"{rate:,.0f}",
                    f"{row['over_floor']:.2f}", size(row["state_bytes"]), size(row["allocated_bytes"]),
                    f"{row['context'] / row['prefill_seconds']:,.0f}", size(row["prefill_peak_bytes"]),
                ]
            )  # fmt: skip
    yield grid(
        ("model", "context", "ms a token", "tokens a second", "over its floor", "state", "allocated beside weights",
         "prefill, tokens a second", "prefill's peak"), table,
    )  # fmt: skip
    yield from _ways(record)
    yield from record.get("notes", [])


def _memory(rows: Sequence[Row]) -> str:
    least, most = (pick(row["allocated_bytes"] for row in rows) for pick in (min, max))
    first, last = rows[0]["context"], rows[-1]["context"]
    if most == least:
        return (
            f"Memory beside the weights is {size(most)} at every context from {first:,} to {last:,} tokens: constant."
        )
    return (
        f"Memory beside the weights goes from {size(least)} to {size(most)} between {first:,} and {last:,} tokens: "
        "not constant."
    )


def _ways(record: Row) -> Iterator[str]:
    """Other ways to a token of Mamba, and whose."""
    floor = record["models"]["mamba_lm_1b4"]["floor_ms"]
    rows = [[name, f"{ms:.3f}", f"{1e3 / ms:,.0f}", f"{ms / floor:.2f}"] for name, ms in record.get("ways", {}).items()]
    theirs = record.get("transformers", {})
    for name, ms in theirs.get("ways", {}).items():
        rows.append(
            [f"`transformers` {theirs['version']}: {name}", f"{ms:.3f}", f"{1e3 / ms:,.0f}", f"{ms / floor:.2f}"]
        )
    if rows:
        yield "Other ways to a token of the same Mamba:"
        yield grid(("way", "ms a token", "tokens a second", "over the floor"), rows)
    if "not run" in theirs:
        yield f"`transformers` was not run: {theirs['not run']}."


def jamba(record: Row) -> Iterator[str]:
    """Prefill, decoding and memory by context, beside an all-attention model."""
    ours, rival = record["models"]["jamba"], record["models"].get("attention")
    per_token = record["cache_bytes_per_token"]
    exact = all(row["attention_bytes"] == row["room"] * per_token for row in ours["rows"])
    constant = len({row["other_state_bytes"] for row in ours["rows"]}) == 1
    beyond = [row["decode_peak_bytes"] - row["attention_bytes"] for row in ours["rows"]]
    grown = max(beyond) - min(beyond)
    yield (
        f"A block of 8 layers (1 attention, 7 Mamba; 4 mixtures of 16 experts) and its vocabulary: "
        f"{ours['parameters'] / 1e9:.1f} B parameters in bfloat16 with random weights, "
        f"{ours['active_parameters'] / 1e9:.2f} B of them active. The prompt is read in chunks of {record['chunk']:,} "
        "tokens; decoding is one CUDA graph a token at batch 1."
    )
    yield (
        f"The attention layer's cache is {'' if exact else '**not** '}{size(per_token)} for each position that there "
        f"is room for; all other state is {size(ours['rows'][-1]['other_state_bytes'])}"
        f"{' at every context' if constant else ' and **not** constant'}. While decoding, memory beyond the weights "
        f"and the cache differs by {size(grown)} between contexts."
    )
    yield _jamba_table(record, rival)
    if "not run" in record:
        yield f"Not run: {record['not run']}."


def _jamba_table(record: Row, rival: Row | None) -> str:
    rows = []
    for name, model in (("Jamba block", record["models"]["jamba"]), (record.get("rival", "attention"), rival)):
        for row in model["rows"] if model else ():
            rate = row["context"] / row["prefill_seconds"]
            rows.append(
                [
                    name, f"{row['context']:,}", f"{rate:,.0f}", f"{row['ms_per_token']:.2f}",
                    f"{1e3 / row['ms_per_token']:,.0f}", size(row["attention_bytes"]), size(row["other_state_bytes"]),
                    size(row["prefill_peak_bytes"]), size(row["decode_peak_bytes"]),
                ]
            )  # fmt: skip
    return grid(
        ("model", "context", "prefill, tokens a second", "decoding, ms a token", "tokens a second", "cache",
         "other state", "prefill's peak beside weights", "decoding's"), rows,
    )  # fmt: skip


def size(n_bytes: float) -> str:
    """A number of bytes in words."""
    value, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.4g} {unit}"


__all__ = ["decoding", "jamba", "size"]
