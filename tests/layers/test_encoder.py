"""The encoder layer and attention against PyTorch's own, and batch norm over tokens."""

import torch
from torch import nn

from selectra.layers.attention import Attention
from selectra.layers.encoder import EncoderLayer
from selectra.layers.norm import BatchNorm2d


def test_it_is_pytorchs_encoder_layer():
    ours = EncoderLayer(Attention(8, 2), 8, 12).double().eval()
    theirs = nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", batch_first=True, dtype=torch.float64).eval()
    names = {
        **{"self_attn.in_proj_weight": "mixer.qkv.weight", "self_attn.in_proj_bias": "mixer.qkv.bias"},
        **{"self_attn.out_proj.weight": "mixer.out_proj.weight", "self_attn.out_proj.bias": "mixer.out_proj.bias"},
        **{f"linear1.{kind}": f"feed_forward.0.{kind}" for kind in ("weight", "bias")},
        **{f"linear2.{kind}": f"feed_forward.3.{kind}" for kind in ("weight", "bias")},
    }
    ours.load_state_dict({names.get(key, key): torch.randn_like(value) for key, value in theirs.state_dict().items()})
    theirs.load_state_dict({key: ours.state_dict()[names.get(key, key)] for key in theirs.state_dict()})
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-10)


def test_attention_weights_are_dropped_in_training_alone():
    layer, x = Attention(8, 2, dropout=0.5), torch.randn(3, 7, 8)
    assert not torch.allclose(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_batch_norm_2d_keeps_statistics_of_each_row_and_feature():
    layer, x = BatchNorm2d(4, 3), 5 + 2 * torch.randn(50, 4, 3)
    y = layer.train()(x)
    assert y.mean(0).abs().max() < 1e-5 and (y.std(0, correction=0) - 1).abs().max() < 1e-2
    assert layer.running_mean is not None
    assert torch.allclose(layer.running_mean, 0.01 * x.mean(0).flatten(), atol=1e-6)
    before = [b.clone() for b in layer.buffers()]
    assert torch.allclose(layer(x[:1]), layer.eval()(x[:1]))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))
