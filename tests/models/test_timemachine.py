"""TimeMachine: what is its own."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.errors import ConfigError
from selectra.mixers import S6
from selectra.models.timemachine import Lone, TimeMachine
from selectra.official import from_official
from selectra.registry import models
from selectra.spec import Spec
from tests.golden import PRECISIONS, Golden

SOURCE = "Atik-Ahamed/TimeMachine:Model"


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", ["timemachine_chmix", "timemachine_chind", "timemachine_lowvar"])
def test_it_computes_what_the_official_code_does(name, dtype, golden: Path):
    Golden.read(golden, name, dtype).check_all()


def written_out(m: TimeMachine, x: Tensor, revin: int, residual: int, ch_ind: int) -> Tensor:
    """The official forward, line by line, on our parts."""
    series, gain, bias = x.shape[2], m.revin.weight, m.revin.bias
    mean = x.mean(1, keepdim=True).detach()
    deviation = (torch.var(x - mean, dim=1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    if revin:
        assert gain is not None and bias is not None
        deviation = deviation.detach()
        x = (x - mean) / deviation * gain + bias
    else:
        x = (x - mean) / deviation
    x = x.permute(0, 2, 1)
    if ch_ind:
        x = x.reshape(x.shape[0] * x.shape[1], 1, x.shape[2])

    def turn(t: Tensor) -> Tensor:
        return t.permute(0, 2, 1) if ch_ind else t

    x = x_res1 = m.lin1(x)
    x4 = turn(m.mamba4(turn(x))) + m.mamba3(x)
    x = x_res2 = m.lin2(x)
    x = turn(m.mamba1(turn(x))) + m.mamba2(x) + (x_res2 if residual else 0)
    x = m.lin3(x) + (x_res1 if residual else 0)
    x = torch.nn.functional.linear(torch.cat([x, x4], dim=2), m.lin4.weight, m.lin4.bias)
    if ch_ind:
        x = x.reshape(-1, series, x.shape[2])
    x = x.permute(0, 2, 1)
    if gain is not None and bias is not None:
        x = (x - bias) / (gain + 1e-5 * 1e-5)
    return x * deviation + mean


@pytest.mark.parametrize(
    ("revin", "residual", "ch_ind", "scales"),
    [(*flags, (9, 5)) for flags in product([0, 1], repeat=3)] + [(1, 1, 1, (4, 7))],
)
def test_every_option_computes_what_the_official_code_does(revin, residual, ch_ind, scales):
    config: dict[str, Any] = {
        **{"seq_len": 14, "pred_len": 6, "enc_in": 3, "n1": scales[0], "n2": scales[1], "dropout": 0.3},
        **{"revin": revin, "residual": residual, "ch_ind": ch_ind, "d_state": 5, "dconv": 3, "e_fact": 2},
    }
    names = {"horizon": "pred_len", "n_series": "enc_in", "d_conv": "dconv", "expand": "e_fact"}
    sizes: dict[str, Any] = {ours: config[names.get(ours, ours)] for ours in (*names, "seq_len", "n1", "n2", "d_state")}
    model = TimeMachine(
        **sizes, channel_independent=bool(ch_ind), residual=bool(residual), window_norm="revin" if revin else "instance"
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    state = {key.replace("revin.", "revin_layer.affine_"): value for key, value in model.state_dict().items()}
    official = from_official(SOURCE, config, state)
    assert isinstance(official.model, TimeMachine) and official.model.dropout1.p == official.model.dropout2.p == 0.3
    x = (5 + 2 * torch.randn(2, 14, 3, dtype=torch.float64)).requires_grad_()
    (got,), expected = official(x), written_out(model, x, revin, residual, ch_ind)
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(got)
    of_got = torch.autograd.grad((got * weight).sum(), [x, *official.model.parameters()], materialize_grads=True)
    of_expected = torch.autograd.grad((expected * weight).sum(), [x, *model.parameters()], materialize_grads=True)
    for mine, theirs in zip(of_got, of_expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)


def test_dropout_stands_at_the_entrance_of_each_scale():
    """All dropped, the Mambas hear nothing, and the residual way around dropout is open."""
    sizes: dict[str, Any] = {"seq_len": 14, "horizon": 6, "n_series": 3, "n1": 8, "n2": 4, "d_state": 4}
    model = TimeMachine(**sizes, window_norm="none").train()
    model.dropout1.p = model.dropout2.p = 1.0
    x = torch.randn(2, 14, 3)
    inner = model.lin2(torch.zeros(2, 3, 8))
    outer = model.lin3(inner) + model.lin1(x.transpose(1, 2))
    expected = model.lin4(torch.cat([outer, torch.zeros_like(outer)], 2))
    assert torch.allclose(model(x), expected, atol=1e-6)


# Thousands of parameters at look-back 96, horizons 96, 192, 336 and 720, worked out from the formula.
COUNTS = {
    "etth1": (7, [1430, 1590, 1890, 370]),
    "etth2": (7, [230, 570, 1740, 1010]),
    "ettm1": (7, [570, 1520, 270, 2290]),
    "ettm2": (7, [520, 290, 820, 1010]),
    "weather": (21, [210, 1740, 330, 2670]),
}


@pytest.mark.parametrize("data", COUNTS)
def test_published_sizes(data):
    n_series, expected = COUNTS[data]
    for horizon, thousands in zip((96, 192, 336, 720), expected, strict=True):
        facts = {"seq_len": 96, "horizon": horizon, "n_series": n_series}
        model = models.build(Spec(f"timemachine_{data}_{horizon}"), facts)
        assert abs(sum(p.numel() for p in model.parameters()) - 1000 * thousands) <= 5000
        assert model.channel_independent and model.residual and model.revin.weight is not None


@pytest.mark.parametrize("data", ["electricity", "traffic"])
def test_sizes_of_wide_data_mix_the_series(data):
    for horizon in (96, 192, 336, 720):
        defaults = models.entry(f"timemachine_{data}_{horizon}").defaults
        assert defaults["channel_independent"] is False
        assert defaults.get("window_norm", "revin") == ("instance" if data == "traffic" else "revin")


def test_independent_series_do_not_see_each_other_and_mixed_ones_see_those_before():
    sizes: dict[str, Any] = {"seq_len": 14, "horizon": 6, "n_series": 3, "n1": 8, "n2": 4, "d_state": 4}
    for independent, seen in ((True, torch.eye(3) > 0), (False, torch.ones(3, 3).tril() > 0)):
        model = TimeMachine(**sizes, channel_independent=independent).eval()
        x = torch.randn(1, 14, 3, requires_grad=True)
        for i in range(3):
            (gradient,) = torch.autograd.grad(model(x)[..., i].sum(), x)
            assert ((gradient != 0).any(1)[0] == seen[i]).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"revin": 2}, "option 'revin' is 2"),
        ({"n_1": 4}, "no supported option 'n_1'.*Did you mean 'n1'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"pred_len": 0}, "horizon=0"),
    ],
)
def test_what_cannot_be_is_named(config, message):
    with pytest.raises(ConfigError, match=message):
        from_official(SOURCE, config, {})


@pytest.mark.parametrize(("length", "width"), [(1, 5), (9, 1), (1, 1)])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_one_token_and_one_channel_are_mambas(length: int, width: int, rank: int, reverse: bool) -> None:
    """Outputs and all gradients against the whole Mamba, in float64."""
    sizes: dict[str, Any] = {"d_state": 7, "d_conv": 2, "expand": 1, "dt_rank": rank}
    lone, whole = Lone(width, **sizes).double(), S6(width, **sizes).double()
    with torch.no_grad():
        for parameter in lone.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    whole.load_state_dict(lone.state_dict())
    x = torch.randn(3, length, width, dtype=torch.float64, requires_grad=True)
    results = []
    for mamba in (lone, whole):
        y = mamba(x, reverse=reverse)
        results.append((y, *torch.autograd.grad(y.sin().sum(), [x, *mamba.parameters()])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_an_adapter_on_a_lone_mambas_projection_is_heard() -> None:
    mamba = Lone(1, d_state=4, d_conv=2, expand=1)
    x = torch.randn(2, 6, 1)
    before = mamba(x)

    def doubled(_module: Any, _inputs: Any, y: Any) -> Any:
        return 2 * y

    mamba.x_proj.register_forward_hook(doubled)
    assert not torch.allclose(mamba(x), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_channel_independence_is_the_same_on_a_gpu() -> None:
    model = TimeMachine(seq_len=96, horizon=24, n_series=3, n1=64, n2=16, dropout=0.0)
    x = torch.randn(4, 96, 3)
    forecast = model(x)
    forecast.square().sum().backward()
    wanted = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    model.cuda()
    again = model(x.cuda())
    again.square().sum().backward()
    torch.testing.assert_close(again.cpu(), forecast, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad.cpu(), wanted[name], rtol=1e-3, atol=1e-3 * float(wanted[name].abs().max())
        )
