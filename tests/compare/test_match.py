"""A budget is met within 2 %, by any model with a width, and what no width meets is refused with the nearest ones."""

import re
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from selectra.compare import measure as measuring
from selectra.compare import room
from selectra.compare.flops import count_flops
from selectra.compare.match import TOLERANCE, match, meet
from selectra.compare.measure import (
    SHAPES,
    build_model,
    count_parameters,
    flops_unbuilt,
    inputs_for,
    kept_for_backward,
    measure,
)
from selectra.errors import ConfigError
from selectra.registry import models
from selectra.spec import Spec

FACTS: dict[str, dict[str, Any]] = {
    "series": {"seq_len": 24, "horizon": 8, "n_series": 3, "season": 24},
    "image": {"n_classes": 10, "in_channels": 3, "img_size": 32},
    "language": {"vocab_size": 20, "seq_len": 32},
    "detection": {"n_classes": 5, "img_size": 64},
}


@pytest.mark.parametrize(
    ("name", "args", "amount", "over"),
    [
        ("tsm2", {}, 20_000, "d_model"),
        ("gru", {}, 30_000, "d_model"),
        ("timemachine", {}, 25_000, "n1"),
        # Sixteen heads allow few widths; the inner width makes up the rest.
        ("patchtst", {"patch_len": 8, "stride": 4}, 100_000, "d_ff"),
        ("vmamba_smoke", {}, 60_000, "dims"),
    ],
)
def test_parameters_are_met(name: str, args: dict[str, Any], amount: int, over: str) -> None:
    facts = FACTS[models.entry(name).kind]
    found = match(Spec(name, **args), facts, params=amount)
    built = models.build(found.spec, facts)
    assert sum(each.numel() for each in built.parameters()) == found.got == found.cost.parameters
    assert abs(found.got / amount - 1) <= TOLERANCE
    assert found.over == over
    # All of it is always told.
    assert found.cost.flops > 0
    assert min(found.cost.forward_ms, found.cost.step_ms, found.cost.activations_mb, found.cost.throughput) > 0


def test_stages_keep_their_proportion() -> None:
    found = match(Spec("vmamba_smoke", dims=(16, 48)), FACTS["image"], params=100_000)
    first, second = found.spec.args["dims"]
    assert abs(second - 3 * first) <= 1


def test_the_last_stage_makes_up_the_rest_where_stages_grow_in_large_steps() -> None:
    spec = Spec("resnet_18", stem="small", dims=(24, 48, 96, 192))
    found = match(spec, FACTS["image"], params=2_200_000)
    assert found.over == "dims[-1]" and abs(found.got / 2_200_000 - 1) < 0.005
    *first, last = found.spec.args["dims"]
    assert first == [28, 56, 112] and last == found.value and abs(last / 224 - 1) < 0.05
    # Where whole steps meet a budget they are taken.
    assert match(spec, FACTS["image"], params=2_150_000).spec.args["dims"] == (28, 56, 112, 224)
    with pytest.raises(ConfigError, match=r"no resnet_18.dims brings resnet_18 within 2 % of 100 parameters"):
        match(spec, FACTS["image"], params=100)


def test_a_multiple_of_the_width_makes_up_the_rest_where_heads_allow_few_widths() -> None:
    found = match(Spec("vit_tiny", patch_size=4, depth=5, n_heads=2), FACTS["image"], params=100_000)
    assert found.over == "d_model * mlp_ratio" and abs(found.got / 100_000 - 1) < 0.005
    width, ratio = found.spec.args["d_model"], found.spec.args["mlp_ratio"]
    assert width % 2 == 0 and int(width * ratio) == found.value
    # As little out of proportion as does it.
    assert 2 < ratio < 7


def test_flops_and_depth_are_met() -> None:
    facts = FACTS["series"]
    found = match(Spec("gru", depth=1), facts, flops=2_000_000)
    assert abs(count_flops(build_model(found.spec, facts), inputs_for(found.spec, facts, 1)) / 2e6 - 1) <= TOLERANCE
    one = count_parameters(Spec("s_mamba", d_model=16, depth=1), facts)
    many = count_parameters(Spec("s_mamba", d_model=16, depth=7), facts)
    deep = match(Spec("s_mamba", d_model=16), facts, params=many, over="depth")
    assert (deep.over, deep.value) == ("depth", 7)
    assert one < many


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("patchtst", {"params": 10}, "no patchtst.d_model brings patchtst within 2 % of 10 parameters"),
        ("dlinear", {"params": 1000}, "'dlinear' has no width to match a budget with"),
        ("tsm2", {}, "match takes one budget above 0"),
        ("tsm2", {"params": 1000, "flops": 1000}, "match takes one budget above 0"),
        ("tsm2", {"params": -1}, "match takes one budget above 0"),
    ],
)
def test_what_cannot_be_met_is_refused(name: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        match(Spec(name), FACTS["series"], **given)


def test_the_nearest_ones_lie_on_both_sides() -> None:
    counts = [count_parameters(Spec("tsm2", d_model=value), FACTS["series"]) for value in (4, 5)]
    with pytest.raises(ConfigError) as caught:
        match(Spec("tsm2"), FACTS["series"], params=sum(counts) / 2)
    found = re.findall(r"d_model=(\d+) with ([\d,]+) parameters", str(caught.value))
    assert found == [(str(value), f"{count:,}") for value, count in zip((4, 5), counts, strict=True)]


@pytest.mark.parametrize(
    ("name", "args", "amount", "words"),
    [
        # Models of which every inner width was once searched at some hundred widths.
        ("s_mamba", {}, 5, "the least is d_model=1 with [0-9,]+ parameters; ask for that"),
        ("timemachine", {}, 5, "the least is n1=1 with [0-9,]+ parameters"),
        ("modern_tcn", {}, 1e12, "the most is d_model=16431 with [0-9,.e+]+ parameters; ask for that"),
        ("vmamba_smoke", {}, 5, "the least is dims=1 with [0-9,]+ parameters"),
        ("rwkv", {"d_model": 64, "depth": 2, "d_ff": 128}, 5, "the least is d_model=1 with [0-9,]+ parameters"),
        ("rwkv", {"d_model": 64, "depth": 2, "d_ff": 128}, 1e12, "the most is d_model=16431 with"),
    ],
)
def test_budgets_beyond_all_reach_are_refused_after_few_tries(
    name: str, args: dict[str, Any], amount: float, words: str
) -> None:
    spec, tries = Spec(name, **args), list[None]()
    with pytest.raises(ConfigError, match=words):
        meet(spec, FACTS[models.entry(name).kind], "params", amount, before_each=lambda: tries.append(None))
    assert len(tries) < 100


def test_an_inner_width_is_turned_where_the_least_width_is_too_large() -> None:
    facts = FACTS["series"]
    spec = Spec("patchtst", patch_len=8, stride=4)
    least = count_parameters(spec.replace(d_model=16, d_ff=32), facts)
    found = meet(spec, facts, "params", 0.9 * least)
    assert found.turned.label == "d_ff" and found.got is not None
    assert abs(found.got / (0.9 * least) - 1) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("gru", {}), ("patchtst", {"patch_len": 8, "stride": 4}), ("tsm2", {}), ("vit_smoke", {}), ("vim_smoke", {}),
        ("vmamba_smoke", {}), ("gpt", {"d_model": 32, "depth": 2}), ("mamba_lm", {"d_model": 32, "depth": 2}),
        ("fcos_smoke", {"backbone": Spec("vmamba_smoke")}),
    ],
)  # fmt: skip
def test_flops_of_a_model_that_is_not_built_are_those_of_a_real_pass(name: str, args: dict[str, Any]) -> None:
    facts = FACTS[models.entry(name).kind]
    spec = Spec(name, **args)
    assert flops_unbuilt(spec, facts) == count_flops(build_model(spec, facts).eval(), inputs_for(spec, facts, 1))


def test_budgets_of_flops_and_time_build_no_giants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of FLOPs nothing is built on the way; what is timed must fit into the memory."""
    built: list[str] = []

    def building(spec: Spec, facts: Any, device: Any = "cpu") -> nn.Module:
        built.append(str(device))
        return build_model(spec, facts, device)

    monkeypatch.setattr(measuring, "build_model", building)
    found = meet(Spec("gru", depth=1), FACTS["series"], "flops", 1e11)
    assert found.got is not None and abs(found.got / 1e11 - 1) <= TOLERANCE and set(built) == {"meta"}
    with pytest.raises(ConfigError, match=r"a latency of 1e\+09 ms is asked for; a budget is at most 10,000 ms"):
        meet(Spec("gru"), FACTS["series"], "latency", 1e9)
    few = count_parameters(Spec("gru", d_model=8), FACTS["series"])
    monkeypatch.setattr(room, "memory_of", lambda device: few * room.BYTES["cpu"])
    del built[:]
    with pytest.raises(ConfigError, match=r"are d_model=8 with .* ms and d_model=9 too large for the memory"):
        meet(Spec("gru"), FACTS["series"], "latency", 5000)
    assert 0 < len([each for each in built if each != "meta"]) < 60


def test_what_does_not_fit_into_the_memory_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "memory_of", lambda device: 2**20)
    words = (
        r"gru with [0-9,]+ parameters is too large for this machine: a training needs 20 bytes .* 52,429 parameters fit"
    )
    with pytest.raises(ConfigError, match=words):
        match(Spec("gru"), FACTS["series"], params=60_000)
    with pytest.raises(ConfigError, match=r"for 3 trainings side by side 0\.0027.* fewer --workers"):
        room.require_room("gru", 50_000, torch.device("cpu"), side_by_side=3)
    room.require_room("gru", 50_000, torch.device("cpu"))
    # Where the memory's size is not known nothing is refused.
    monkeypatch.setattr(room, "memory_of", lambda device: None)
    room.require_room("gru", 1e15, torch.device("cpu"))


@pytest.mark.parametrize("name", ["patchtst", "vit_smoke", "gpt"])
def test_flops_count_attention_as_its_products(name: str) -> None:
    """A CPU's own attention counts as what is done one product after the other; without a formula it counted none."""
    spec, facts = Spec(name, **({"d_model": 32, "depth": 2} if name == "gpt" else {})), FACTS[models.entry(name).kind]
    model, inputs = build_model(spec, facts).eval(), inputs_for(spec, facts, 1)
    with sdpa_kernel(SDPBackend.MATH):
        products = count_flops(model, inputs)
    assert count_flops(model, inputs) == products


def test_flops_count_fourier_transforms() -> None:
    transforms = {
        "c2c": lambda x: torch.fft.fft(x.to(torch.complex64), dim=1),
        "r2c": lambda x: torch.fft.rfft(x, dim=1),
        "c2r": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=8, dim=1),
    }
    x = torch.randn(3, 8, 5)

    class Transform(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return transforms[self.name](x)

    # Of 15 transforms of length 8, 5 n log2(n) each where they are complex.
    assert {name: count_flops(Transform(name), x) for name in transforms} == {"c2c": 1800, "r2c": 900, "c2r": 1800}


def test_flops_count_scans_by_the_rule_of_the_field() -> None:
    facts = FACTS["series"]
    few, many = (count_flops(build_model(s, facts), inputs_for(s, facts, 1))
                 for s in (Spec("simba_series", d_state=8), Spec("simba_series", d_state=16)))  # fmt: skip
    spec = models.resolve(Spec("simba_series"), facts)
    patches = cast(Any, build_model(Spec("simba_series"), facts)).embed.n_patches
    steps = facts["n_series"] * patches * spec["depth"].value
    inner = 2 * spec["d_model"].value
    # Nine for each step, channel and state, and two for each product with B's and C's projections.
    assert many - few == steps * inner * 8 * (9 + 2 * 2)


def test_memory_kept_is_that_of_a_network_counted_by_hand() -> None:
    net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
    x = torch.randn(16, 8)
    # GELU keeps its input, the second layer its own; the first layer's input is the caller's.
    assert kept_for_backward(net, x) * 2**20 == 2 * 16 * 32 * 4


def test_kinds_and_facts_that_cannot_be_measured_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="the facts must say img_size, n_frames"):
        inputs_for(Spec("videomamba_clip_smoke"), {}, 1)
    monkeypatch.delitem(SHAPES, "video")
    with pytest.raises(ConfigError, match="is for video; what can be measured are models for series"):
        inputs_for(Spec("videomamba_clip_smoke"), {}, 1)
    with pytest.raises(ConfigError, match="the facts must say n_series"):
        inputs_for(Spec("tsm2"), {"seq_len": 4}, 1)


def test_what_learns_nothing_has_no_step() -> None:
    cost = measure(Spec("naive"), FACTS["series"], seconds=0.01)
    assert (cost.parameters, cost.step_ms, cost.activations_mb) == (0, 0.0, 0.0)


@pytest.mark.parametrize("name", ["gpt", "mamba_lm", "rwkv", "retnet", "hyena"])
def test_widths_of_language_models_are_multiples(name: str) -> None:
    """Also the inner ones; and the budget is met all the same."""
    inner = {} if name == "mamba_lm" else {"d_ff": 96}
    spec = Spec(name, d_model=48, depth=2, **inner, **({"n_heads": 2} if name in ("gpt", "retnet") else {}))
    facts = {"vocab_size": 20, "seq_len": 32}
    found = match(spec, facts, params=100_000, align=8, tolerance=0.1)
    assert all(found.spec.args[each] % 8 == 0 for each in ("d_model", *inner))
    assert abs(found.cost.parameters / 100_000 - 1) <= 0.1 and found.cost.flops > 0


@pytest.mark.parametrize("params", [30_000, 50_000, 200_000])
def test_an_inner_width_that_follows_by_itself_makes_up_the_rest(params: int) -> None:
    facts = {"seq_len": 96, "horizon": 24, "n_series": 3}
    # Eight heads allow multiples of eight alone, which lie up to 28 % apart.
    found = match(Spec("itransformer"), facts, params=params)
    assert abs(found.got / params - 1) <= TOLERANCE and found.over == "d_ff"
    assert count_parameters(found.spec, facts) == found.got
