"""Generation: rows of unequal lengths, draws, stop strings, and what is refused."""

import collections
from typing import Any

import pytest
import torch
from torch import Tensor

import selectra.models  # noqa: F401
from selectra.errors import ConfigError, DataError
from selectra.language import generate as module
from selectra.language.generate import generate, padded, state_bytes
from selectra.language.model import LanguageModel
from selectra.language.sampling import Sampling
from selectra.registry import models
from selectra.spec import Spec

VOCAB = 19
NAMES = ["mamba_lm_smoke", "jamba_smoke", "gpt_smoke", "rwkv_smoke", "retnet_smoke", "hyena_smoke"]
EACH = pytest.mark.parametrize("name", NAMES)


def build(name: str) -> LanguageModel:
    model = models.build(Spec(name), {"vocab_size": VOCAB}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def prompts_of(*lengths: int) -> list[list[int]]:
    return [torch.randint(VOCAB, (n,)).tolist() for n in lengths]


def by_whole_sequences(model: LanguageModel, prompt: list[int], n: int) -> list[int]:
    """Greedy, everything computed anew for every token."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@EACH
@pytest.mark.parametrize("chunk", [1, 4])
def test_rows_of_unequal_lengths_are_what_each_is_alone(name, chunk):
    model, prompts = build(name), prompts_of(5, 1, 9, 4)
    answers = generate(model, prompts, max_new_tokens=8, chunk=chunk)
    assert answers == [by_whole_sequences(model, prompt, 8) for prompt in prompts]


@EACH
def test_rows_end_by_themselves(name):
    model, prompts = build(name), prompts_of(3, 6)
    free = generate(model, prompts, max_new_tokens=20)
    stop = free[0][4]
    answers = generate(model, prompts, max_new_tokens=20, stop_tokens={stop})
    for row, whole in zip(answers, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert row == whole[:end]
    told: list[tuple[int, int]] = []

    def on_token(row: int, token: int) -> bool:
        told.append((row, token))
        return row == 1

    answers = generate(model, prompts, max_new_tokens=5, on_token=on_token)
    assert answers == [free[0][:5], free[1][:1]]
    assert told[:2] == [(0, free[0][0]), (1, free[1][0])] and len(told) == 6


def test_draws_repeat_with_their_seed_and_follow_the_probabilities():
    model, prompts = build("gpt_smoke"), prompts_of(4) * 3
    sampling = Sampling(temperature=1.5)
    runs = [
        generate(model, prompts, max_new_tokens=8, sampling=sampling, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert len({tuple(row) for row in runs[0]}) == 3
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]]).expand(20_000, 4)
    counts = collections.Counter(Sampling(temperature=2.0).draw(logits).tolist())
    for token, share in enumerate((logits[0] / 2).softmax(0).tolist()):
        assert counts[token] / 20_000 == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.5}, [1]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_k": 3, "top_p": 0.9}, [1, 3]),
    ],
)
def test_filters_leave_the_likeliest(options, kept):
    """Probabilities 0.1, 0.5, 0.05, 0.35; of the three likeliest the two first have 0.89."""
    probabilities = torch.tensor([[0.1, 0.5, 0.05, 0.35]])
    found = Sampling(temperature=1.0, **options).probabilities(probabilities.log())
    if options == {"top_k": 3, "top_p": 0.9}:
        kept = [0, 1, 3]
    assert found[0].nonzero().flatten().tolist() == kept
    assert Sampling(temperature=1.0, **options).draw(probabilities.log()).item() in kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p=1\.5"),
        ({"top_k": 3}, "no effect at temperature 0"),
    ],
)
def test_draws_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-40, 1e-310, 5e-324])
def test_the_lowest_temperatures_take_the_likeliest(temperature, dtype):
    logits = torch.randn(3, 9, dtype=dtype) * 50
    found = Sampling(temperature=temperature, top_k=4, top_p=0.9)
    assert torch.equal(found.draw(logits), logits.argmax(-1))
    assert torch.equal(Sampling(temperature=temperature).draw(logits), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(temperature):
    model = build("mamba_lm_smoke")
    with torch.no_grad():
        model.norm_f.weight[3] = float("nan")
    with pytest.raises(DataError, match="not finite after prompt 1 of 2: its weights are broken"):
        generate(model, prompts_of(2, 3), max_new_tokens=3, sampling=Sampling(temperature=temperature))


def test_bad_prompts_are_refused():
    model = build("gpt_smoke")
    for prompts, message in (([], "no prompt"), ([[1], []], "prompt 2 of 2 is empty"), ([[1, VOCAB]], "vocabulary")):
        with pytest.raises(DataError, match=message):
            generate(model, prompts, max_new_tokens=3)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        generate(model, [[1]], max_new_tokens=0)


def test_what_does_not_fit_into_memory_is_refused_before_anything_is_read(monkeypatch):
    model = build("gpt_smoke")
    monkeypatch.setattr(module, "memory_of", lambda _: 10_000)

    def must_not_run(*_: Any, **__: Any) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(model, "step_", must_not_run)
    with pytest.raises(ConfigError, match=r"2 rows of 1003 tokens.*GiB"):
        generate(model, [[1, 2, 3], [4]], max_new_tokens=1000)
    with pytest.raises(ConfigError, match="at most 256"):
        generate(build("hyena_smoke"), [[1] * 200], max_new_tokens=57)


@EACH
def test_the_memory_of_a_state_is_known_before_it_is_made(name):
    model = build(name)
    assert state_bytes(model, 3, 50) == model.init_state(3, 50).n_bytes
    if name in ("mamba_lm_smoke", "rwkv_smoke", "retnet_smoke"):
        assert state_bytes(model, 1, 10**9) == state_bytes(model, 1, 1)


def test_prompts_are_padded_on_the_left():
    tokens, mask = padded([[1, 2, 3], [4]])
    assert tokens.tolist() == [[1, 2, 3], [0, 0, 4]] and mask is not None
    assert mask.tolist() == [[True] * 3, [False, False, True]]
    assert padded([[1], [2]])[1] is None


def test_a_recorded_step_takes_the_place_of_the_models_own(monkeypatch):
    """What a graph does is tested on a GPU; here, that every token after the first goes through it."""
    recorded: list[int] = []

    class Replayed:
        def __init__(self, model: LanguageModel, state: Any) -> None:
            # Recorded when the prompts are read.
            assert state.seen.tolist() == [5, 5]
            self.model, self.state = model, state

        def __call__(self, tokens: Tensor) -> Tensor:
            recorded.append(tokens.shape[1])
            return self.model.step_(tokens, self.state)

    model, prompts = build("mamba_lm_smoke"), prompts_of(5, 5)
    wanted = generate(model, prompts, max_new_tokens=6)
    monkeypatch.setattr(module, "GraphedStep", Replayed)
    assert generate(model, prompts, max_new_tokens=6, graphed=True) == wanted
    assert recorded == [1] * 5
    assert generate(model, prompts, max_new_tokens=1, graphed=True) == [row[:1] for row in wanted]
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="the model is on cpu; a CUDA graph needs it on a GPU"):
        generate(model, prompts, max_new_tokens=2, graphed=True)
