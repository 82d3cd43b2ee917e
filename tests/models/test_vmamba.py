"""VMamba: what is its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.errors import ConfigError, DataError
from selectra.mixers import CrossScan2d
from selectra.models.vmamba import UngatedCrossScan2d, VMamba
from selectra.official import from_official
from selectra.registry import models
from selectra.spec import Spec
from tests.golden import PRECISIONS, Golden

SOURCE = "MzeroMiko/VMamba:VSSM"
FIXTURES = [
    *("vmamba_v05noz_ln2d", "vmamba_v05noz_ln2d_s1", "vmamba_v05noz_lowvar", "vmamba_v0_ln_n16", "vmamba_v0_lowvar"),
    *("vmamba_v3_ln_n16_z", "vmamba_backbone_v05noz"),
]


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", FIXTURES)
def test_it_computes_what_the_official_code_does(name, dtype, golden: Path):
    Golden.read(golden, name, dtype).check_all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        *(("tiny", 22_893_448), ("small", 44_417_416), ("base", 76_254_056)),
        *(("tiny_s2l5", 30_705_832), ("small_s2l15", 50_147_752), ("base_s2l15", 88_557_800)),
        *(("tiny_s1l8", 30_249_064), ("small_s1l20", 49_012_840), ("base_s1l20", 86_614_504)),
    ],
)
def test_published_sizes(size, expected):
    with torch.device("meta"):
        model = models.build(Spec(f"vmamba_{size}"))
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(("d_model", "expected"), [(96, 105_216), (192, 339_456), (384, 1_195_008), (768, 4_454_400)])
def test_the_gated_mixers_sizes(d_model, expected):
    with torch.device("meta"):
        assert sum(p.numel() for p in CrossScan2d(d_model).parameters()) == expected


# With one state, by `expand` and width.
UNGATED = {
    2: {96: 52_032, 192: 196_224, 384: 761_088, 768: 2_996_736},
    1: {96: 26_016, 192: 98_112, 384: 380_544, 768: 1_498_368},
}


@pytest.mark.parametrize("expand", UNGATED)
@pytest.mark.parametrize("d_model", UNGATED[1])
def test_the_ungated_mixers_sizes(d_model, expand):
    with torch.device("meta"):
        mixer = UngatedCrossScan2d(d_model, expand=expand)
    assert sum(p.numel() for p in mixer.parameters()) == UNGATED[expand][d_model]


CONFIG: dict[str, Any] = {
    **{"depths": [1, 2], "dims": [8, 12], "num_classes": 3, "ssm_d_state": 2, "forward_type": "v05_noz"},
    **{"ssm_conv_bias": False, "downsample_version": "v3", "patchembed_version": "v2", "norm_layer": "ln2d"},
}
SIZES: dict[str, Any] = {
    **{"depths": (1, 2), "dims": (8, 12), "n_classes": 3, "d_state": 2, "gate": False, "conv_bias": False},
    **{"mlp_ratio": 4.0, "downsample": "conv3", "stem": "convolutions"},
}


# From our names to those of the official second version.
STEM = {"first.conv": "0", "first.norm": "2", "second.conv": "5", "second.norm": "7"}
MIXER = {
    "A_log": "A_logs",
    "D": "Ds",
    "dt_bias": "dt_projs_bias",
    "x_proj": "x_proj_weight",
    "dt_proj": "dt_projs_weight",
}


def official_state(model: VMamba) -> dict[str, Tensor]:
    """Our state under the official names of the second version."""
    return {
        official_name(key): value.flatten(0, 1) if key.endswith((".A_log", ".D")) else value
        for key, value in model.state_dict().items()
    }


def official_name(key: str) -> str:
    before, _, last = key.rpartition(".")
    if key.startswith(("norm.", "head.")):
        return f"classifier.{key}"
    if before.endswith("mixer"):
        return f"{before.replace('.mixer', '.op')}.{MIXER[last]}"
    name = key.replace(".mixer.", ".op.")
    name = name.replace(".downsample.conv.", ".downsample.1.").replace(".downsample.norm.", ".downsample.3.")
    for ours, theirs in STEM.items():
        name = name.replace(f"patch_embed.{ours}", f"patch_embed.{theirs}")
    return name


def test_every_form_of_the_names_is_read():
    model, x = VMamba(**SIZES).eval(), torch.randn(1, 3, 21, 30)
    state = official_state(model)
    newer = {
        key.replace("x_proj_weight", "x_proj.weight").replace("dt_projs_weight", "dt_projs.weight"): (
            value.flatten(0, 1) if "projs_weight" in key or "x_proj_weight" in key else value
        )
        for key, value in state.items()
    }
    maps = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    pixels = {key: value[..., None, None] if key.endswith(maps) else value for key, value in state.items()}
    for form in (state, newer, pixels):
        assert torch.equal(from_official(SOURCE, CONFIG, form)(x)[0], model(x))


def test_forward_types_that_compute_the_same():
    model, x = VMamba(**SIZES).eval(), torch.randn(1, 3, 21, 30)
    for kind in ("v05_noz", "v2_noz", "v3_noz_no32", "v01_noz"):
        assert torch.equal(
            from_official(SOURCE, {**CONFIG, "forward_type": kind}, official_state(model))(x)[0], model(x)
        )


def test_the_first_versions_names_are_read():
    config = {**CONFIG, "forward_type": "v0", "mlp_ratio": 0.0, "downsample_version": "v1", "patchembed_version": "v1"}
    sizes = {"depths": (1, 2), "dims": (8, 12), "n_classes": 3, "d_state": 2}
    model, x = VMamba(**sizes).eval(), torch.randn(1, 3, 21, 30)
    base = {key.replace("downsample.3.", "downsample.norm."): value for key, value in official_state(model).items()}
    newer = {
        "patch_embed.proj": "patch_embed.0",
        "patch_embed.norm": "patch_embed.2",
        "downsample.norm": "downsample.1",
        "downsample.reduction": "downsample.2",
    }
    older = {"classifier.": "", ".op.": ".self_attention."}
    for names in (newer, older):
        state = {renamed(key, names): value for key, value in base.items()}
        if names is older:
            state = {key.replace("0.norm.", "0.ln_1.").replace("1.norm.", "1.ln_1."): v for key, v in state.items()}
        assert torch.equal(from_official(SOURCE, config, state)(x)[0], model(x))


def renamed(key: str, names: dict[str, str]) -> str:
    for before, after in names.items():
        key = key.replace(before, after)
    return key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forward_type": "v05_nozz"}, "option 'forward_type' is 'v05_nozz'.*Did you mean 'v05_noz'"),
        ({"norm_layer": "bn"}, "option 'norm_layer' is 'bn'"),
        ({"posembed": True}, "option 'posembed' is True"),
        ({"gmlp": True}, "option 'gmlp' is True"),
        ({"ssm_drop_rate": 0.1}, "option 'ssm_drop_rate' is 0.1"),
        ({"ssm_dstate": 4}, "no supported option 'ssm_dstate'.*Did you mean 'ssm_d_state'"),
        ({"ssm_conv": 4}, "option 'ssm_conv' is 4; it takes odd numbers from 3 on"),
        # Official code leaves the convolution out there.
        ({"ssm_conv": 1}, "option 'ssm_conv' is 1; it takes odd numbers from 3 on"),
        ({"ssm_conv": -1}, "option 'ssm_conv' is -1; it takes odd numbers from 3 on"),
        ({"num_classes": 0}, "option 'num_classes' is 0; it takes 1 or more"),
        ({"ssm_ratio": 0}, "^MzeroMiko/VMamba:VSSM: expand=0.0: needs a finite number above 0"),
        ({"ssm_act_layer": "gelu"}, "option 'ssm_act_layer' is 'gelu'.*'silu'"),
        ({"depths": [1]}, r"dims=\(8, 12\) and depths=\(1,\)"),
    ],
)
def test_what_is_not_supported_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_official(SOURCE, {**CONFIG, **changes}, official_state(VMamba(**SIZES)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forward_type": "v052d"}, "option 'forward_type' is 'v052d'"),
        ({"pretrained": "file.pth"}, "option 'pretrained' is 'file.pth'"),
        ({"out_indices": [0, 2]}, "option 'out_indices' has 2; there are 2 stages"),
        ({"out_indices": []}, "option 'out_indices' is empty"),
        ({"norm_layr": "ln"}, "no supported option 'norm_layr'.*Did you mean 'norm_layer'"),
        ({"options": {}}, "no supported option 'options'"),
    ],
)
def test_the_backbones_options_are_the_classifiers(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_official("MzeroMiko/VMamba:Backbone_VSSM", {**CONFIG, **changes}, {})


@pytest.mark.parametrize("given", [(1, 0), (0, 1), (1, 1, 0)])
def test_the_backbones_grids_come_in_the_order_of_the_stages(given):
    """Whatever the order of `out_indices`, and each once: the official code asks of every stage whether it is in it."""
    model, x = VMamba(**SIZES).eval(), torch.randn(1, 3, 21, 30)
    norms = {i: torch.nn.LayerNorm(d) for i, d in enumerate(model.feature_dims)}
    state = {key: value for key, value in official_state(model).items() if not key.startswith("classifier.")}
    state |= {f"outnorm{i}.{key}": value for i, norm in norms.items() for key, value in norm.state_dict().items()}
    grids = from_official("MzeroMiko/VMamba:Backbone_VSSM", {**CONFIG, "out_indices": given}, state)(x)
    assert len(grids) == 2
    for i, grid in enumerate(model.features(x)):
        assert torch.equal(grids[i], norms[i](grid).permute(0, 3, 1, 2))


def test_a_state_that_does_not_fit_is_described():
    state = official_state(VMamba(**SIZES))
    wrong = {**state, "layers.0.blocks.0.op.A_logs": torch.ones(7, 2)}
    with pytest.raises(DataError, match=r"'layers.0.blocks.0.mixer.A_log' has the shape \(7, 2\)"):
        from_official(SOURCE, CONFIG, wrong)


def turned(model: VMamba) -> VMamba:
    """The same weights for images with rows and columns exchanged: routes 0 and 1, 2 and 3 change places."""
    other = VMamba(**{**SIZES, "gate": True, "downsample": "conv2", "stem": "patches"}).double()
    state = model.state_dict()
    for key, value in state.items():
        if key.endswith(("conv.weight", "conv2d.weight", "patch_embed.proj.weight")):
            state[key] = value.transpose(2, 3)
        elif key.rpartition(".")[2] in ("A_log", "D", "x_proj", "dt_proj", "dt_bias"):
            state[key] = value[[1, 0, 3, 2]]
    other.load_state_dict(state)
    return other.eval()


def test_rows_and_columns_are_alike():
    model = VMamba(**{**SIZES, "gate": True, "downsample": "conv2", "stem": "patches"}).double().eval()
    for mixer in model.modules():
        if isinstance(mixer, CrossScan2d):
            torch.nn.init.normal_(mixer.A_log)
    x = torch.randn(2, 3, 24, 40, dtype=torch.float64)
    assert torch.allclose(turned(model)(x.transpose(2, 3)), model(x), rtol=1e-10)


def test_the_start_as_shipped_draws_the_steps_anew():
    mamba, shipped = (VMamba(dims=(64,), depths=(1,), start=start) for start in ("mamba", "shipped"))
    stds = [model.get_parameter("layers.0.blocks.0.mixer.dt_proj").std().item() for model in (mamba, shipped)]
    assert stds[0] > 0.2 and 0.015 < stds[1] < 0.025
