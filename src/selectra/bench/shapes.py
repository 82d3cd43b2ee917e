"""The shapes that the GPU benchmark times, each with the tag by which it is known."""

import difflib
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from selectra.errors import ConfigError

Tagged = TypeVar("Tagged", bound="HasTag")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class HasTag(Protocol):
    """Whatever is known by a tag."""

    @property
    def tag(self) -> str:
        """The tag."""
        ...


class Case(NamedTuple):
    """Sizes and kinds of one measurement; softplus, step bias and skip are always there."""

    tag: str
    b: int
    d: int
    l: int
    n: int = 16
    groups: int = 1
    dtype: str = "bf16"
    gate: bool = True
    extra: bool = False
    """Left out of the geometric means."""
    short_memory: bool = False
    """Steps of about 0.1 and A from -1 to -n, instead of decays of all speeds."""

    @property
    def elements(self) -> int:
        """Entries of u."""
        return self.b * self.d * self.l

    @property
    def kind(self) -> tuple[int, int, str, bool]:
        """What selects a kernel: state size, groups, type, gate."""
        return self.n, self.groups, self.dtype, self.gate

    def arguments(self, device: torch.device, seed: int = 0) -> dict[str, Tensor | None]:
        """Random inputs as they stand in a block: delta before softplus, B and C (b, l, g, n), float32 parameters."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            # Drawn in the type itself: a float32 copy of the longest shapes would fill the memory.
            return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

        dtype = DTYPES[self.dtype]
        wide, narrow = (self.b, self.l, self.d), (self.b, self.l, self.groups, self.n)
        A, delta_bias = -normal(self.d, self.n).exp(), normal(self.d) - 3
        if self.short_memory:
            A = -torch.arange(1.0, self.n + 1, device=device).repeat(self.d, 1)
            delta_bias = torch.full((self.d,), -2.0, device=device)
        return {
            "u": normal(*wide, dtype=dtype),
            "delta": normal(*wide, dtype=dtype),
            "A": A,
            "B": normal(*narrow, dtype=dtype),
            "C": normal(*narrow, dtype=dtype),
            "D": normal(self.d),
            "z": normal(*wide, dtype=dtype) if self.gate else None,
            "delta_bias": delta_bias,
        }

    def facts(self) -> dict[str, Any]:
        """How a record states it."""
        return {
            "tag": self.tag, "B": self.b, "D": self.d, "L": self.l, "N": self.n,
            "groups": self.groups, "dtype": self.dtype, "gate": self.gate,
        }  # fmt: skip


CASES = (
    Case("lm", 8, 2048, 2048),
    Case("lm-odd", 8, 2048, 2047),
    Case("lm-odd+", 8, 2048, 2049),
    Case("lm-3000", 8, 2048, 3000),
    Case("lm-4096", 8, 2048, 4096),
    Case("lm-1000", 8, 2048, 1000),
    Case("lm-500", 8, 2048, 500),
    Case("lm-long", 1, 2048, 65536),
    Case("lm-long-odd", 1, 2048, 65537),
    Case("vim-t", 128, 384, 197),
    Case("vim-s-1248", 8, 768, 6085),
    Case("ss2d-n16", 32, 768, 3136, groups=4, gate=False),
    Case("vmamba-s1", 64, 768, 3136, 1, groups=4, gate=False),
    Case("vmamba-s2", 64, 1536, 784, 1, groups=4, gate=False),
    Case("vmamba-s3", 64, 3072, 196, 1, groups=4, gate=False),
    Case("series", 32, 1024, 96, dtype="fp32"),
    Case("series-720", 224, 256, 720, dtype="fp32"),
    Case("lm-fp32", 8, 2048, 2048, dtype="fp32"),
    Case("lm-n64", 8, 2048, 2048, 64),
    Case("lm-long-short-memory", 1, 2048, 65536, extra=True, short_memory=True),
    Case("lm-n1", 8, 2048, 2048, 1, extra=True),
    Case("lm-n4", 8, 2048, 2048, 4, extra=True),
    Case("lm-n8", 8, 2048, 2048, 8, extra=True),
)
# For trying the benchmark out where a real shape would take minutes.
TINY_CASES = (
    Case("tiny", 1, 8, 20, 4),
    Case("tiny-groups", 2, 8, 9, 1, groups=4, gate=False),
    Case("tiny-fp32", 1, 6, 5, 2, dtype="fp32", extra=True),
)


def chosen_cases(
    tags: str | None,
    cases: tuple[Tagged, ...] = CASES,  # pyright: ignore[reportArgumentType]
) -> tuple[Tagged, ...]:
    """The cases whose tags are named, separated by commas; all of them without.

    Raises:
        ConfigError: A tag is unknown.
    """
    if tags is None:
        return cases
    known = {case.tag: case for case in cases}
    wanted = [tag.strip() for tag in tags.split(",") if tag.strip()]
    for tag in wanted:
        if tag not in known:
            near = difflib.get_close_matches(tag, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"there is no shape '{tag}'; there are {', '.join(known)}.{hint}")
    if not wanted:
        raise ConfigError(f"--tags names no shape; there are {', '.join(known)}.")
    return tuple(known[tag] for tag in wanted)
