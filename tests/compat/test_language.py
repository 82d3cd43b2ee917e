"""mamba_ssm's language model by its names: blocks, generation with a cache, files."""

# pyright: reportMissingImports=false

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from selectra.errors import ConfigError

pytestmark = pytest.mark.usefixtures("installed")


def model(**changed: Any) -> Any:
    """A small language model in float64."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    options: dict[str, Any] = {"d_model": 8, "n_layer": 2, "vocab_size": 13, **changed}
    return MambaLMHeadModel(MambaConfig(**options)).double()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("inner", [0, 16])
def test_blocks_add_norm_and_mix(fused: bool, inner: int) -> None:
    net = model(fused_add_norm=fused, d_intermediate=inner, rms_norm=fused, residual_in_fp32=False)
    tokens = torch.randint(13, (2, 5))
    x, residual = net.backbone.embedding(tokens), 0
    for layer in net.backbone.layers:
        for norm, part in (("norm", "mixer"), ("norm2", "mlp")):
            if part == "mlp" and not inner:
                continue
            residual = residual + x
            x = getattr(layer, part)(getattr(layer, norm)(residual))
    want = net.lm_head(net.backbone.norm_f(residual + x))
    found = net(tokens)
    assert found.logits.shape == (2, 5, 16)  # a multiple of 8
    torch.testing.assert_close(found.logits, want)
    torch.testing.assert_close(net(tokens, num_last_tokens=1).logits, want[:, -1:])
    assert net.lm_head.weight is net.backbone.embedding.weight
    assert [layer.layer_idx for layer in net.backbone.layers] == [0, 1]


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_generation_with_a_cache_equals_generation_without(layer: str) -> None:
    net = model(ssm_cfg={"layer": layer, **({"headdim": 4, "d_state": 8} if layer == "Mamba2" else {})})
    prompt = torch.randint(13, (2, 4))
    sequence = prompt
    for _ in range(5):
        sequence = torch.cat([sequence, net(sequence).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(net.generate(prompt, 9), sequence)
    found = net.generate(prompt, 9, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(found.sequences, sequence) and len(found.scores) == 5
    assert set(net.allocate_inference_cache(2, 9)) == {0, 1}
    # An end token in every row stops it; a teacher's tokens are taken.
    ended = net.generate(prompt[:1], 9, eos_token_id=int(sequence[0, 4]))
    assert ended.shape[1] == 5
    taught = torch.randint(13, (2, 9))
    assert torch.equal(net.generate(prompt, 9, teacher_outputs=taught)[:, 4:], taught[:, 4:])


def test_sampling_leaves_only_what_the_bounds_allow() -> None:
    from mamba_ssm.utils.generation import sample

    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().expand(200, -1)
    assert set(sample(logits, top_k=2).tolist()) == {1, 3}
    assert set(sample(logits, top_k=4, top_p=0.5).tolist()) == {1, 3}
    assert set(sample(logits, top_k=0, min_p=0.6).tolist()) == {1, 3}
    assert set(sample(logits, top_k=0).tolist()) == {0, 1, 2, 3}
    assert set(sample(logits, top_k=3, temperature=0.01).tolist()) == {1}
    assert (sample(logits) == 1).all()
    with pytest.raises(ConfigError, match=r"top_p=1\.5"):
        sample(logits, top_k=2, top_p=1.5)


def test_repeated_tokens_are_penalised() -> None:
    from mamba_ssm.utils.generation import InferenceParams

    net, prompt = model(), torch.randint(13, (1, 4))
    free = net.generate(prompt, 5)[0, -1]
    punished = net.generate(torch.cat([prompt, free[None, None]], 1), 6, repetition_penalty=1e9)[0, -1]
    assert punished != free
    cache = InferenceParams(3, 4, seqlen_offset=2, lengths_per_sample=torch.ones(2))
    cache.reset(5, 6)
    assert (cache.max_seqlen, cache.max_batch_size, cache.seqlen_offset) == (5, 6, 0)
    assert cache.lengths_per_sample is not None and (cache.lengths_per_sample == 0).all()


def test_save_and_load(tmp_path: Path) -> None:
    from mamba_ssm import MambaLMHeadModel

    net, tokens = model(), torch.randint(13, (1, 4))
    net.save_pretrained(str(tmp_path / "net"))
    assert json.loads((tmp_path / "net" / "config.json").read_text())["d_model"] == 8
    again = MambaLMHeadModel.from_pretrained(str(tmp_path / "net"), dtype=torch.float64)
    torch.testing.assert_close(again(tokens).logits, net(tokens).logits)


def test_what_is_not_covered_is_said() -> None:
    with pytest.raises(ConfigError, match="layer 1 is an attention layer"):
        model(attn_layer_idx=[1])
    with pytest.raises(ConfigError, match="the layer 'Mamba3'; selectra"):
        model(ssm_cfg={"layer": "Mamba3"})


def test_initial_values_shrink_with_the_depth() -> None:
    torch.manual_seed(0)
    deep, flat = model(n_layer=16), model(n_layer=1)
    spread = [net.backbone.layers[0].mixer.out_proj.weight.std().item() for net in (deep, flat)]
    assert spread[0] < 0.4 * spread[1]
    assert abs(deep.backbone.embedding.weight.std().item() - 0.02) < 0.01


def test_block_of_2024_and_perceptron() -> None:
    from mamba_ssm.modules.mamba_simple import Block, Mamba
    from mamba_ssm.modules.mlp import GatedMLP

    block = Block(8, lambda dim: Mamba(dim, d_state=4), fused_add_norm=True).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    y, residual = block(x, x)
    torch.testing.assert_close(residual, 2 * x)
    torch.testing.assert_close(y, block.mixer(block.norm(2 * x)))
    assert block.allocate_inference_cache(2, 3)[0].shape == (2, 16, 4)
    mlp = GatedMLP(12).double()
    assert mlp.fc1.weight.shape == (256, 12)
    z = torch.randn(3, 12, dtype=torch.float64)
    a, b = mlp.fc1(z).chunk(2, -1)
    torch.testing.assert_close(mlp(z), mlp.fc2(a * b * torch.sigmoid(b)))
