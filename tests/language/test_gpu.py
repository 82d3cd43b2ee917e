"""Language models on a GPU: against the CPU, in CUDA graphs, experts' grouped kernel."""

from itertools import pairwise
from typing import Any

import pytest
import torch

import selectra.models  # noqa: F401
from selectra.errors import ConfigError
from selectra.language.generate import generate
from selectra.language.graphed import GraphedStep
from selectra.layers.moe import grouped_product
from selectra.mixers.wkv import NOTHING, wkv, wkv_chunked
from selectra.registry import models
from selectra.spec import Spec

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
NAMES = [name for name in models.names("language") if name.endswith("_smoke")]


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return models.build(Spec(name, **options), {"vocab_size": 32}).eval()


def test_a_graph_needs_a_gpu():
    model = build("gpt_smoke")
    if torch.cuda.is_available():
        pytest.skip("is for machines without one")
    with pytest.raises(ConfigError, match="needs it on a GPU"):
        GraphedStep(model, model.init_state(1, 4))


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_what_a_cpu_gives(name):
    model, tokens = build(name), torch.randint(32, (3, 50))
    mask = torch.arange(50) >= torch.tensor([0, 9, 33])[:, None]
    wanted = model(tokens, mask=mask).detach()
    model = model.cuda()
    found = model(tokens.cuda(), mask=mask.cuda()).detach().cpu()
    assert (found - wanted)[mask].abs().max() <= 2e-4 * wanted.abs().max()
    state = model.init_state(3, capacity=50)
    stepped = [model.step_(part.cuda(), state) for part in tokens.split([30, 17, 1, 1, 1], 1)]
    whole = model(tokens.cuda())
    assert (torch.cat(stepped, 1) - whole).abs().max() <= 2e-4 * whole.abs().max()


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_steps_as_the_model_does(name, dtype):
    if name == "jamba_smoke" and dtype == torch.float32:
        pytest.skip("experts in float32 are padded to the longest group, for which the host waits")
    model, tokens = build(name).to("cuda", dtype), torch.randint(32, (2, 20), device="cuda")
    states = [model.init_state(2, capacity=20) for _ in range(2)]
    for state in states:
        model.step_(tokens[:, :10], state)
    graphed = GraphedStep(model, states[1])
    for t in range(10, 20):
        wanted = model.step_(tokens[:, t : t + 1], states[0])
        assert torch.equal(graphed(tokens[:, t : t + 1]), wanted)
    assert states[1].seen.tolist() == [20, 20]


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("name", ["mamba_lm_smoke", "gpt_smoke"])
def test_a_graph_generates_what_the_model_does(name):
    model = build(name).to("cuda", torch.bfloat16)
    prompts = [torch.randint(32, (7,)).tolist() for _ in range(2)]
    wanted = generate(model, prompts, max_new_tokens=12)
    assert generate(model, prompts, max_new_tokens=12, graphed=True) == wanted


@pytest.mark.gpu
@NEEDS_GPU
@torch.no_grad()
def test_recording_a_step_copies_no_cache_and_changes_no_state():
    model = models.build(Spec("gpt_smoke", d_model=256, n_heads=4), {"vocab_size": 32}).eval().cuda().bfloat16()
    state = model.init_state(1, capacity=2**18)
    model.step_(torch.randint(32, (1, 30), device="cuda"), state)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    GraphedStep(model, state)
    # Matrix products have a workspace on each stream, on an H200 of 64 MiB.
    assert torch.cuda.max_memory_allocated() - held < state.n_bytes / 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())


@pytest.mark.gpu
@NEEDS_GPU
def test_grouped_products_are_those_of_a_loop():
    torch.manual_seed(0)
    x = torch.randn(70, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(5, 48, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    borders = [0, 30, 30, 31, 69, 70]
    ends = torch.tensor(borders[1:], dtype=torch.int32, device="cuda")
    y = grouped_product(x, weight, ends)
    wanted = torch.cat([x[a:b] @ weight[e].T for e, (a, b) in enumerate(pairwise(borders))])
    assert (y.float() - wanted.float()).abs().max() <= 0.02 * wanted.abs().max()
    dy = torch.randn_like(y)
    found, expected = torch.autograd.grad(y, [x, weight], dy), torch.autograd.grad(wanted, [x, weight], dy)
    for got, want in zip(found, expected, strict=True):
        assert (got.float() - want.float()).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("decay", [1e-2, 8.0])
def test_rwkvs_sums_by_the_scan_are_those_in_chunks(decay):
    """Outputs and gradients in float32 against float64, from no state on, with keys that differ by e^60."""
    shape = (2, 300, 24)
    k, v = 10 * torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    w, u = torch.full((24,), decay, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    weights, found = torch.randn(shape, dtype=torch.float64), []
    for function, dtype, device in ((wkv_chunked, torch.float64, "cpu"), (wkv, torch.float32, "cuda")):
        inputs = [tensor.to(device, dtype).requires_grad_() for tensor in (k, v, w, u)]
        zero = torch.zeros(2, 24, dtype=dtype, device=device)
        y, _ = function(inputs[0], inputs[1], inputs[2], inputs[3], (zero, zero, torch.full_like(zero, NOTHING)))
        found.append([y, *torch.autograd.grad((y * weights.to(device, dtype)).sum(), inputs)])
    for wanted, got in zip(*found, strict=True):
        assert (got.double().cpu() - wanted).abs().max() <= 2e-4 * wanted.abs().max()
