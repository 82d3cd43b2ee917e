"""Our language models and Hugging Face's, side by side: logits, greedy tokens, the loss of routers, files both ways."""

from typing import Any

import pytest
import torch
from torch import Tensor

from selectra.language.checkpoint import from_pretrained, save_pretrained
from selectra.language.model import LanguageModel
from selectra.layers.moe import balance
from selectra.official import from_official
from tests.models.transformers_double import Double

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install 'selectra[dev]')")

COMMON = {"vocab_size": 37, "hidden_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {"num_hidden_layers": 3, "state_size": 8}),
    "mamba odd": ("Mamba", {"hidden_size": 20, "num_hidden_layers": 2, "state_size": 5, "conv_kernel": 3, "expand": 3,
                            "time_step_rank": 7, "use_bias": True, "tie_word_embeddings": False}),
    "mamba narrow": ("Mamba", {"hidden_size": 9, "num_hidden_layers": 1, "state_size": 1, "conv_kernel": 2,
                               "use_conv_bias": False, "layer_norm_epsilon": 1e-3, "residual_in_fp32": False}),
    "mamba2": ("Mamba2", {"num_heads": 6, "head_dim": 8, "state_size": 12, "n_groups": 2, "num_hidden_layers": 3,
                          "chunk_size": 7}),
    "mamba2 odd": ("Mamba2", {"hidden_size": 20, "num_heads": 12, "head_dim": 5, "expand": 3, "state_size": 3,
                              "n_groups": 4, "num_hidden_layers": 2, "use_bias": True, "conv_kernel": 2,
                              "tie_word_embeddings": True}),
    "mamba2 narrow": ("Mamba2", {"hidden_size": 8, "num_heads": 16, "head_dim": 1, "state_size": 1, "n_groups": 1,
                                 "num_hidden_layers": 1, "use_conv_bias": False, "time_step_limit": (0.01, 0.05)}),
    "jamba": ("Jamba", {"num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 16,
                        "intermediate_size": 20, "mamba_d_state": 6}),
    "jamba odd": ("Jamba", {"hidden_size": 18, "num_hidden_layers": 5, "num_attention_heads": 3,
                            "num_key_value_heads": 1, "num_experts": 3, "num_experts_per_tok": 1,
                            "attn_layer_period": 3, "attn_layer_offset": 0, "expert_layer_period": 3,
                            "expert_layer_offset": 2, "intermediate_size": 13, "mamba_d_conv": 3, "mamba_dt_rank": 5,
                            "mamba_proj_bias": True, "mamba_conv_bias": False, "tie_word_embeddings": True}),
    "jamba dense": ("Jamba", {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
                              "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
                              "intermediate_size": 20}),
    "rwkv": ("Rwkv", {"num_hidden_layers": 3}),
    "rwkv odd": ("Rwkv", {"hidden_size": 18, "attention_hidden_size": 11, "intermediate_size": 29,
                          "num_hidden_layers": 2, "layer_norm_epsilon": 1e-3}),
    "rwkv tied": ("Rwkv", {"hidden_size": 10, "num_hidden_layers": 2, "tie_word_embeddings": True}),
    "llama": ("Llama", {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
                        "intermediate_size": 31, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
}  # fmt: skip
# Hugging Face's RWKV has no mask. Where its Mamba's projections have a bias, its convolution sees that bias at padding:
# its padded rows are not what the same rows are alone, and ours are.
MASKED = [
    name
    for name, (kind, options) in CASES.items()
    if kind != "Rwkv" and not options.get("use_bias") and not options.get("mamba_proj_bias")
]
EACH = pytest.mark.parametrize("case", CASES)


def official(case: str) -> Any:
    """A random instance of Hugging Face's class, in float64, whose every weight matters."""
    name, options = CASES[case]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **options})
    # The others know no float64.
    config._attn_implementation = config._experts_implementation = "eager"
    with Double():
        model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ours(theirs: Any) -> LanguageModel:
    config = {key: value for key, value in theirs.config.to_dict().items() if key != "dtype"}
    found = from_official(f"huggingface/transformers:{type(theirs).__name__}", config, theirs.state_dict())
    assert isinstance(found.model, LanguageModel)
    return found.model


def logits_of(theirs: Any, tokens: Tensor, **options: Any) -> Tensor:
    with Double(), torch.no_grad():
        return theirs(tokens, use_cache=False, **options).logits


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())


@EACH
def test_logits_are_equal(case):
    theirs = official(case)
    tokens = torch.randint(3, 37, (2, 19))
    wanted = logits_of(theirs, tokens)
    model = ours(theirs)
    assert close(model(tokens).detach(), wanted)
    # And in pieces.
    first, state = model.scan(tokens[:, :8], model.init_state(2))
    assert close(torch.cat([first, model.scan(tokens[:, 8:], state)[0]], 1).detach(), wanted)


@pytest.mark.parametrize("case", MASKED)
def test_logits_of_left_padded_rows_are_equal(case):
    theirs = official(case)
    tokens = torch.randint(3, 37, (3, 13))
    mask = torch.arange(13) >= torch.tensor([0, 4, 12])[:, None]
    tokens = tokens.masked_fill(~mask, 0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # A Transformer with positions counts them from the first token.
    options = {"position_ids": positions} if case == "llama" else {}
    wanted = logits_of(theirs, tokens, attention_mask=mask.long(), **options)
    assert close(ours(theirs)(tokens, mask=mask)[mask].detach(), wanted[mask])


def continued(model: LanguageModel, prompt: Tensor, n: int) -> Tensor:
    """Greedy tokens with a state."""
    tokens, state = prompt, model.init_state(len(prompt), capacity=prompt.shape[1] + n)
    logits = model.step_(tokens, state)
    for _ in range(n):
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        logits = model.step_(tokens[:, -1:], state)
    return tokens


@pytest.mark.parametrize("case", ["mamba narrow", "mamba2 narrow", "jamba odd", "rwkv tied", "llama"])
def test_200_greedy_tokens_are_those_of_generate(case):
    """Hugging Face's own generation, with its cache."""
    rwkv = case.startswith("rwkv")
    # One row for RWKV: with a state, single positions of several rows are mixed up there.
    theirs, prompt = official(case), torch.randint(3, 37, (1 if rwkv else 2, 7))
    theirs.generation_config.eos_token_id = None
    with torch.no_grad():
        if rwkv:
            wanted = rwkv_tokens(theirs, prompt)
        else:
            wanted = theirs.generate(prompt, max_new_tokens=200, do_sample=False, use_cache=True)
    tokens = continued(ours(theirs), prompt, 200)
    assert torch.equal(tokens, wanted)
    assert len(tokens.unique()) > 3


def rwkv_tokens(theirs: Any, tokens: Tensor) -> Tensor:
    """Its own recurrent form: Hugging Face's `generate` does not carry RWKV's state in every version."""
    found = theirs(tokens, use_cache=True)
    for _ in range(200):
        newest = found.logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, newest], 1)
        found = theirs(newest, state=found.state, use_cache=True)
    return tokens


@pytest.mark.parametrize(("case", "padded"), [("jamba", False), ("jamba odd", False), ("jamba", True)])
def test_the_loss_of_routers_is_equal(case, padded):
    theirs, tokens = official(case), torch.randint(3, 37, (3, 13))
    mask = torch.arange(13) >= torch.tensor([0, 4, 11])[:, None] if padded else None
    options = {} if mask is None else {"attention_mask": mask.long()}
    with Double():
        found = theirs(tokens, output_router_logits=True, use_cache=False, **options)
        found.aux_loss.backward()
    model = ours(theirs)
    routed = model(tokens, mask=mask, routers=True)
    got = balance(routed.router_logits, theirs.config.num_experts_per_tok, mask)
    assert close(got.loss.detach(), found.aux_loss.detach())
    got.loss.backward()
    router, theirs_router = (
        next(p for key, p in each.named_parameters() if key.endswith("router.weight")) for each in (model, theirs)
    )
    assert router.grad is not None and theirs_router.grad is not None and close(router.grad, theirs_router.grad)
    assert got.use.shape == (theirs.config.num_experts,) and abs(float(got.use.sum()) - 1) < 1e-12


@pytest.mark.parametrize("case", ["mamba", "mamba2 narrow", "jamba", "rwkv odd", "llama"])
def test_files_go_both_ways(case, tmp_path):
    theirs, tokens = official(case), torch.randint(3, 37, (2, 9))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    model = from_pretrained(tmp_path / "theirs")
    wanted = logits_of(theirs, tokens)
    assert next(model.parameters()).dtype == torch.float64
    assert close(model(tokens).detach(), wanted)
    save_pretrained(model, tmp_path / "ours", max_shard_size="20KB")
    with Double():
        back = type(theirs).from_pretrained(tmp_path / "ours", dtype=torch.float64).eval()
    back.config._attn_implementation = back.config._experts_implementation = "eager"
    assert close(logits_of(back, tokens), wanted)
    assert close(from_pretrained(tmp_path / "ours")(tokens).detach(), wanted)
    same = ("pad_token_id", "bos_token_id", "eos_token_id")
    assert [getattr(back.config, name) for name in same] == [getattr(theirs.config, name) for name in same]
