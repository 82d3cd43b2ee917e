"""Hugging Face's Mamba, Mamba-2 and Jamba: stored logits, gradients, left padding and greedy tokens with a cache."""

from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.language.model import LanguageModel
from tests.golden import PRECISIONS, Golden

NAMES = [
    "hf_mamba_lm", "hf_mamba_lm_leftpad", "hf_mamba_lowvar", "hf_mamba2_lm", "hf_mamba2_lowvar", "hf_jamba_lm",
    "hf_jamba_lm_leftpad", "hf_jamba_lowvar",
]  # fmt: skip
EACH = pytest.mark.parametrize("name", NAMES)
PRECISE = pytest.mark.parametrize("dtype", PRECISIONS, ids=str)


def key_of(module: Any, official: str) -> str:
    """Our key of an official parameter."""
    one = torch.zeros(1)
    (ours,) = module.rename({official: one})
    return ours


@EACH
@PRECISE
def test_logits_and_gradients(golden, name, dtype):
    stored = Golden.read(golden, name, dtype)
    module = stored.module()
    inputs = stored.inputs()
    (logits,) = module(*inputs)
    padded = "leftpad" in name
    if padded:
        present = inputs[1].bool()
        wanted = stored.tensors["out64.logits" if dtype == torch.float64 else "out.logits"]
        slack = 1e-9 if dtype == torch.float64 else 1e-4
        assert (logits - wanted)[present].abs().max() <= slack * wanted[present].abs().max()
    name_of_out = "logits_last" if padded else "logits"
    out = logits[:, -1] if padded else logits
    out = out.reshape(stored.tensors[f"out64.{name_of_out}"].shape)
    stored.check("out", name_of_out, out)
    (out * stored.tensors[f"lossw.{name_of_out}"].to(dtype)).sum().backward()
    parameters = dict(module.model.named_parameters())
    assert stored.about["grads"]
    for official in stored.about["grads"]:
        stored.check("grad", official, parameters[key_of(module, official)].grad)


@EACH
@PRECISE
def test_greedy_tokens_with_state(golden, name, dtype):
    stored = Golden.read(golden, name, dtype)
    model = stored.module().model
    assert isinstance(model, LanguageModel)
    tokens, *rest = stored.inputs()
    mask = rest[0].bool() if rest else None
    wanted = stored.tensors["out.generated"]
    n = wanted.shape[1] - tokens.shape[1]
    state = model.init_state(len(tokens), capacity=wanted.shape[1])
    logits = model.step_(tokens, state, mask=mask, n_logits=1)
    seen: list[Tensor] = []
    for _ in range(n):
        seen.append(logits[:, -1])
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        logits = model.step_(tokens[:, -1:], state)
    assert torch.equal(tokens, wanted)
    stored.check("out", "gen_logits", torch.stack(seen, 1))
