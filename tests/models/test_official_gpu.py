"""Official outputs and gradients on a GPU, in float32."""

from pathlib import Path

import pytest
import torch

from tests.golden import Golden

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
# Sums go in another order than on a CPU, whose own rounding the stored tolerances are made from.
SLACK = 4
NAMES = [
    *("vim_v2_midcls_div2", "vim_v2_midcls_div2_stride", "vim_v2_midcls_nodiv", "vim_v2_nocls_meanpool"),
    *("vim_v2_lowvar", "vim_mixer_v1", "vim_mixer_v2"),
    *("vmamba_v05noz_ln2d", "vmamba_v05noz_ln2d_s1", "vmamba_v05noz_lowvar", "vmamba_v0_ln_n16", "vmamba_v0_lowvar"),
    *("vmamba_v3_ln_n16_z", "vmamba_backbone_v05noz"),
    *("simba_net_einfft", "simba_net_mlp", "simba_net_lowvar", "simba_block_einfft", "simba_block_mlp"),
    *("rsmamba_shuffle_gate", "rsmamba_gate_midcls", "rsmamba_mean", "rsmamba_lowvar"),
    *("videomamba_image", "videomamba_video", "videomamba_video_lowvar"),
]


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_the_official_code_does(name, golden: Path):
    stored = Golden.read(golden, name, torch.float32)
    with_features = name.startswith("vim_v2")
    stored.check_all(
        (lambda m, x: {"features": m(*x, return_features=True)[0]}) if with_features else None,
        device="cuda",
        slack=SLACK,
    )
