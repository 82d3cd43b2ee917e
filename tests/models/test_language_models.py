"""What is each language model's own: published sizes, recurrences against loops, checkpoints' layouts."""

from typing import Any

import pytest
import torch

import selectra.models  # noqa: F401
from selectra.compat.language import MambaConfig, MambaLMHeadModel
from selectra.errors import ConfigError, DataError
from selectra.language.model import LanguageModel
from selectra.mixers import CausalAttention
from selectra.mixers.wkv import NOTHING, wkv_chunked, wkv_scanned
from selectra.models.hyena import HyenaMixer, long_convolution
from selectra.models.jamba import fuse_experts, split_experts
from selectra.models.retnet import Retention, retention
from selectra.models.rwkv import ChannelMix, TimeMix
from selectra.official import from_official
from selectra.ops.ssd import ssd
from selectra.registry import models
from selectra.spec import Spec

MAMBA_SSM = "state-spaces/mamba:MambaLMHeadModel"


@pytest.mark.parametrize(
    ("name", "millions", "vocab_size"),
    [
        ("mamba_lm_130m", 129.135, None),
        ("mamba_lm_1b4", 1372.2, None),
        ("mamba_lm_2b8", 2768.3, None),
        ("mamba_lm_mamba2_130m", 129.0, None),
        ("mamba_lm_mamba2_2b7", 2702.6, None),
        ("jamba_v01", 51570.3, None),
        ("jamba_large", 398557.0, None),
        ("rwkv_169m", 169.342, None),
        ("rwkv_14b", 14148.0, None),
        ("hyena_153m", 153, 50264),
        ("gpt_1b3", 1300.0, 50257),
        ("retnet_1b3", 1300.0, 32000),
    ],
)
def test_published_sizes(name, millions, vocab_size):
    """Counted without memory; where a round number is all that was published, within 5 %."""
    facts = {} if vocab_size is None else {"vocab_size": vocab_size}
    with torch.device("meta"):
        model = models.build(Spec(name), facts)
    got = sum(p.numel() for p in model.parameters()) / 1e6
    assert got == pytest.approx(millions, rel=0.05 if vocab_size else 2e-4)


def test_mambas_130_million_to_the_last_one():
    with torch.device("meta"):
        model = models.build(Spec("mamba_lm_130m"), {})
    assert sum(p.numel() for p in model.parameters()) == 129_135_360


def test_of_jambas_52_billion_12_are_active():
    with torch.device("meta"):
        model = models.build(Spec("jamba_v01"))
    experts = sum(p.numel() for key, p in model.named_parameters() if ".experts." in key)
    active = sum(p.numel() for p in model.parameters()) - experts * 14 / 16
    assert active == pytest.approx(12.1e9, rel=0.01)
    kinds = [type(mixer).__name__ for mixer in model.mixers()]
    assert [i for i, kind in enumerate(kinds) if kind == "CausalAttention"] == [4, 12, 20, 28]
    assert [i for i, block in enumerate(model.layers) if hasattr(block.mlp, "experts")] == list(range(1, 32, 2))


def test_jambas_cache_is_what_the_arithmetic_says():
    """4 KiB a token for each attention layer of 8 heads of 128 in half precision; the rest has one size."""
    with torch.device("meta"):
        model = models.build(Spec("jamba_block")).bfloat16()
        sizes = [model.init_state(1, capacity=n).n_bytes for n in (0, 1, 262144)]
    assert sizes[1] - sizes[0] == 4096
    assert sizes[2] - sizes[0] == 2**30
    # 7 Mamba layers: 8192 channels, 16 states in float32 and 4 inputs; and the counts.
    assert sizes[0] == 7 * (8192 * 16 * 4 + 8192 * 4 * 2) + 2 * 8


@pytest.mark.parametrize("wkv", [wkv_chunked, wkv_scanned])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_wkv_is_the_loop(wkv, length):
    """Eq. 16 as written, with gradients, from a state that is not empty."""
    shape = (2, length, 5)
    k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, u = (torch.rand(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    top = torch.randn(2, 5, dtype=torch.float64)
    num, den = torch.randn(2, 5, dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64)
    inputs = [k, v, w, u]
    a, b, rows = num * top.exp(), den * top.exp(), []
    for t in range(length):
        now = (u + k[:, t]).exp()
        rows.append((a + now * v[:, t]) / (b + now))
        a, b = a * (-w).exp() + k[:, t].exp() * v[:, t], b * (-w).exp() + k[:, t].exp()
    wanted = torch.stack(rows, 1)
    y, (num, den, top) = wkv(k, v, w, u, (num, den, top))
    assert torch.allclose(y, wanted, rtol=1e-11, atol=1e-12)
    assert torch.allclose(num * top.exp(), a) and torch.allclose(den * top.exp(), b)
    weights = torch.randn_like(y)
    found = torch.autograd.grad((y * weights).sum() + (num * top.exp()).sum(), inputs, retain_graph=True)
    expected = torch.autograd.grad((wanted * weights).sum() + a.sum(), inputs)
    assert all(torch.allclose(got, want, rtol=1e-9, atol=1e-11) for got, want in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "mixer", [TimeMix(6, 5), ChannelMix(6, 7), Retention(8, 2, 6), CausalAttention(8, 4, 2, 100.0)], ids=str
)
def test_absent_positions_leave_a_mixers_state_as_it_is(mixer):
    """Also behind a row's last token, and where a row has none."""
    mixer = mixer.double()
    x = torch.randn(3, 7, mixer.d_model, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([4, 0, 7])[:, None]
    _, start = mixer.scan(torch.randn(3, 3, mixer.d_model, dtype=torch.float64), mixer.init_state(3))
    y, after = mixer.scan(x, start, mask=mask)
    assert (y[~mask] == 0).all()
    for row, n in enumerate((4, 0, 7)):
        alone, state = mixer.scan(x[row : row + 1, :n], type(start)(*(tensor[row : row + 1] for tensor in start)))
        assert torch.allclose(y[row, :n], alone[0], rtol=1e-10, atol=1e-12)
        # By what follows, since sums may be written in several ways.
        more = torch.randn(1, 2, mixer.d_model, dtype=torch.float64)
        of_row = type(after)(*(tensor[row : row + 1] for tensor in after))
        for found, wanted in zip(mixer.scan(more, of_row)[0], mixer.scan(more, state)[0], strict=True):
            assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wkv", [wkv_chunked, wkv_scanned])
def test_wkv_overflows_nowhere(wkv):
    k = torch.tensor([0.0, 500.0, -500.0, 1000.0])[None, :, None].expand(1, 4, 1)
    v = torch.arange(4.0)[None, :, None]
    empty = (torch.zeros(1, 1), torch.zeros(1, 1), torch.full((1, 1), NOTHING))
    y, sums = wkv(k, v, torch.ones(1), torch.zeros(1), empty)
    assert torch.allclose(y.flatten(), torch.tensor([0.0, 1.0, 1.0, 3.0])) and all(s.isfinite().all() for s in sums)


@pytest.mark.parametrize("decay", [1e-3, 20.0])
def test_a_scanned_wkv_is_exact_over_long_rows_and_wild_keys(monkeypatch, decay):
    """In pieces, from no state on, with a peak that the scale must come down from."""
    monkeypatch.setattr("selectra.mixers.wkv.LONGEST", 300)
    k = 3 * torch.randn(1, 1000, 4, dtype=torch.float64)
    k[:, 100], k[:, 500:] = 80.0, k[:, 500:] - 200
    v = torch.randn_like(k)
    w, u = torch.full((4,), decay, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    zero, nothing = (torch.full((1, 4), value, dtype=torch.float64) for value in (0.0, NOTHING))
    empty = zero, zero, nothing
    wanted, of_chunks = wkv_chunked(k, v, w, u, empty)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        keys, values, decays, bonus, zero, nothing = (tensor.to(dtype) for tensor in (k, v, w, u, zero, nothing))
        y, sums = wkv_scanned(keys, values, decays, bonus, (zero, zero, nothing))
        assert torch.allclose(y.double(), wanted, rtol=tolerance, atol=tolerance)
        mean, expected = sums[0] / sums[1], of_chunks[0] / of_chunks[1]
        assert torch.allclose(mean.double(), expected, rtol=tolerance, atol=tolerance)
        size = of_chunks[2] + of_chunks[1].log() - sums[2] - sums[1].log()
        assert size.abs().max() < 100 * tolerance


@pytest.mark.parametrize("length", [1, 64, 70])
@pytest.mark.parametrize("masked", [False, True])
def test_retention_is_one_function_in_three_forms(length, masked):
    q, k = (torch.randn(2, length, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(2, length, 3, 5, dtype=torch.float64, requires_grad=True)
    decay = torch.log1p(-(2.0 ** torch.tensor([-5, -3, -1], dtype=torch.float64)))
    state = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, length) > 0.3 if masked else None
    results = []
    for form in ("parallel", "recurrent", "chunked"):
        y, after = retention(q, k, v, decay, state, mask, form)
        torch.manual_seed(1)
        loss = (y * torch.randn(y.shape)).sum() + (after * torch.randn(after.shape)).sum()
        results.append((y, after, *torch.autograd.grad(loss, [q, k, v, state])))
    for other in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(results[0], other, strict=True))


def test_a_long_convolution_is_the_sum():
    u, h = torch.randn(2, 9, 3, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    wanted = torch.stack([sum(h[j] * u[:, t - j] for j in range(t + 1)) for t in range(9)], 1)  # pyright: ignore[reportArgumentType]
    assert torch.allclose(long_convolution(u, h), wanted)


def test_hyenas_filters_are_those_of_a_part_of_the_length():
    mixer = HyenaMixer(4, 100, order=3)
    assert mixer.filter(100).shape == (100, 8)
    assert torch.allclose(mixer.filter(100)[:7], mixer.filter(7), atol=1e-6)
    # The window alone: the slowest falls to 1 % after 1.5 lengths, the fastest after 0.3.
    window = HyenaMixer(4, 101)
    with torch.no_grad():
        window.filter.last.weight.fill_(1.0)
        window.filter.sine.forward = lambda x: torch.full_like(x, 1 / x.shape[-1])
    taps = window.filter(101)
    assert taps[-1, 0].item() == pytest.approx(1e-2 ** (1 / 1.5), rel=1e-4)
    assert taps[30, -1].item() == pytest.approx(1e-2, rel=1e-4)


SMALL: dict[str, Any] = {"d_model": 12, "n_layer": 2, "vocab_size": 21}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ssm_cfg": {"layer": "Mamba1", "d_state": 5, "d_conv": 3}, "tie_embeddings": False, "rms_norm": False},
        {"ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 4, "ngroups": 2}, "pad_vocab_size_multiple": 16},
    ],
)
def test_mamba_ssms_models_are_read(options):
    """Beside the stand-in for mamba_ssm's own class, which has parameters of the same names."""
    # It keeps the stream in float32, where it is asked for that, also in float64.
    config = {**SMALL, "residual_in_fp32": False, **options}
    theirs = MambaLMHeadModel(MambaConfig(**config)).double().eval()
    model = from_official(MAMBA_SSM, config, theirs.state_dict()).model
    tokens = torch.randint(21, (2, 9))
    assert torch.allclose(model(tokens), theirs(tokens).logits, rtol=1e-10, atol=1e-10)
    assert isinstance(model, LanguageModel) and model.vocab_size == len(theirs.lm_head.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "'Mamba3'; it takes Mamba1, Mamba2"),
        ({"ssm_cfg": {"d_stat": 3}}, "'d_stat'"),
        ({"d_intermediate": 8}, "d_intermediate"),
    ],
)
def test_what_mamba_ssm_has_and_we_have_not_is_said(options, message):
    with pytest.raises(ConfigError, match=message):
        from_official(MAMBA_SSM, {**SMALL, **options}, {})


def test_experts_are_fused_and_split():
    model = models.build(Spec("jamba_smoke"), {"vocab_size": 7})
    config, state = model.hugging_face()
    assert "model.layers.1.feed_forward.experts.3.up_proj.weight" in state
    fused = fuse_experts(state)
    assert "model.layers.1.feed_forward.experts.gate_up_proj" in fused
    again = split_experts(fused)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    source = "huggingface/transformers:JambaForCausalLM"
    options = {key: value for key, value in config.items() if key != "dtype"}
    tokens = torch.randint(7, (2, 5))
    for given in (state, fused):
        assert torch.equal(from_official(source, options, given).model(tokens), model.eval()(tokens))
    # An expert that lacks a matrix is named.
    del state["model.layers.1.feed_forward.experts.3.up_proj.weight"]
    with pytest.raises(DataError, match=r"lacks 'layers\.1\.mlp\.experts\.down_proj'"):
        from_official(source, options, state)


def test_a_tied_matrix_may_be_in_the_state_once_or_twice_but_not_in_two_versions():
    theirs = MambaLMHeadModel(MambaConfig(**SMALL)).eval()
    state = theirs.state_dict()
    tokens = torch.randint(21, (1, 4))
    wanted = theirs(tokens).logits
    for gone in ("lm_head.weight", "backbone.embedding.weight"):
        part = {key: value for key, value in state.items() if key != gone}
        assert torch.allclose(from_official(MAMBA_SSM, SMALL, part).model(tokens), wanted, atol=1e-5)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(DataError, match="they differ"):
        from_official(MAMBA_SSM, SMALL, state)


def test_offsets_outside_their_period_are_refused():
    with pytest.raises(ConfigError, match="attn_offset=8"):
        models.build(Spec("jamba_smoke", attn_offset=8), {"vocab_size": 7})


@pytest.mark.parametrize("function", ["ssd", "wkv"])
def test_autocast_rounds_nothing_inside_a_recurrence(function):
    x, w = torch.randn(2, 70, 3, 4), torch.rand(3)

    def call():
        if function == "ssd":
            return ssd(x, x[..., 0].sigmoid(), -w, x[:, :, :1], x[:, :, 1:2])
        zero = torch.zeros(2, 4)
        empty = zero, zero, torch.full((2, 4), NOTHING)
        y, sums = wkv_chunked(x[:, :, 0], x[:, :, 1], torch.rand(4).exp(), torch.zeros(4), empty)
        return y, sums[0]

    torch.manual_seed(1)
    wanted = call()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = call()
    assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt_smoke", {"d_ff": 0}), ("gpt_smoke", {"d_ff": -1}),
        ("jamba_smoke", {"d_ff": 0}), ("jamba_smoke", {"d_ff": -1}), ("rwkv_smoke", {"d_inner": 0}),
        ("rwkv_smoke", {"d_ff": -1}), ("retnet_smoke", {"d_ff": -1}), ("retnet_smoke", {"d_value": 0}),
        ("hyena_smoke", {"d_ff": 0}), ("mamba_lm_smoke", {"d_state": 0}), ("mamba_lm_smoke", {"dropout": 1.0}),
        ("gpt_smoke", {"dropout": -0.1}),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused(name, options):
    """In words, and not taken for a size that was left out."""
    ((what, size),) = options.items()
    with pytest.raises(ConfigError, match=f"{what}={size}: needs at least"):
        models.build(Spec(name, **options), {"vocab_size": 9})


def test_a_configuration_without_heads_is_refused():
    config = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 0}
    with pytest.raises(ConfigError, match="num_attention_heads=0: needs at least 1"):
        from_official("huggingface/transformers:LlamaForCausalLM", config, {})
