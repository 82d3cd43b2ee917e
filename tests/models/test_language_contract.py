"""What every registered language model keeps, found by itself: causality, one state for all uses, padding, packing."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import selectra.models  # noqa: F401
from selectra.errors import ConfigError, DataError
from selectra.language.model import LanguageModel
from selectra.language.stream import fork, load_stream, save_stream
from selectra.registry import models
from selectra.spec import Spec

VOCAB = 23
NAMES = [name for name in models.names("language") if name.endswith("_smoke")]
MAMBA2: dict[str, Any] = {"mixer": "mamba2", "d_head": 8, "n_groups": 2}
CASES = [(name, {}) for name in NAMES] + [
    ("mamba_lm_smoke", MAMBA2),
    ("mamba_lm_smoke", {"tied": False, "norm": "layer", "d_conv": 2}),
    ("hyena_smoke", {"order": 3}),
    ("retnet_smoke", {"form": "parallel"}),
    ("retnet_smoke", {"form": "recurrent"}),
]
EACH = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n} {' '.join(map(str, o))}" for n, o in CASES])


def build(name: str, **options: Any) -> LanguageModel:
    """In float64, with all parameters moved away from where they start, so that each matters."""
    model = models.build(Spec(name, **options), {"vocab_size": VOCAB}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def draw(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * max(1.0, float(b.detach().abs().max())))


def test_the_rivals_of_the_thread_are_there():
    families = {name.removesuffix("_smoke") for name in NAMES}
    assert {"mamba_lm", "jamba", "gpt", "rwkv", "retnet", "hyena"} <= families


@EACH
def test_no_logit_depends_on_later_tokens_or_other_rows(name, options):
    model, tokens = build(name, **options), draw(3, 17)
    logits = model(tokens)
    assert logits.shape == (3, 17, VOCAB)
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % VOCAB
    assert close(model(changed)[:, :9], logits[:, :9])
    assert not close(model(changed)[:, 9:], logits[:, 9:], 1e-4)
    assert close(model(tokens[1:2]), logits[1:2])


@EACH
@pytest.mark.parametrize("sizes", [(13, 27), (0, 1, 2, 37), (1,) * 40])
def test_chunks_of_any_size_give_what_the_whole_gives(name, options, sizes):
    model, tokens = build(name, **options), draw(2, 40)
    whole = model(tokens)
    state, parts = model.init_state(2), []
    for part in tokens.split(sizes, 1):
        logits, state = model.scan(part, state)
        parts.append(logits)
    assert close(torch.cat(parts, 1), whole)
    assert state.seen.tolist() == [40, 40]
    state = model.init_state(2, capacity=40)
    stepped = [model.step_(part, state) for part in tokens.split(sizes, 1)]
    assert close(torch.cat(stepped, 1), whole)
    assert state.seen.tolist() == [40, 40]


@EACH
def test_float32_chunks_stay_within_1e_5(name, options):
    model, tokens = build(name, **options).float(), draw(2, 70)
    whole = model(tokens)
    first, state = model.scan(tokens[:, :33], model.init_state(2))
    second, state = model.scan(tokens[:, 33:69], state)
    third, _ = model.scan(tokens[:, 69:], state)
    assert close(torch.cat([first, second, third], 1), whole, 1e-5)


@EACH
def test_gradients_flow_through_the_carried_state(name, options):
    model, tokens = build(name, **options), draw(2, 12)
    weights = torch.randn(2, 12, VOCAB, dtype=torch.float64)
    # Only what follows the border counts: all that earlier tokens' embeddings get has come through the state.
    weights[:, :5] = 0
    (model(tokens) * weights).sum().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    first, state = model.scan(tokens[:, :5], model.init_state(2))
    second, _ = model.scan(tokens[:, 5:], state)
    (torch.cat([first, second], 1) * weights).sum().backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert close(found[key], gradient, 1e-9), key


@EACH
def test_every_parameter_gets_a_gradient(name, options):
    model = build(name, **options).train()
    model(draw(4, 31)).square().sum().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The first position has no predecessor, but later ones do.
    assert without == []
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def masks() -> dict[str, Tensor]:
    t = torch.arange(11)
    lengths = torch.tensor([11, 4, 7, 1])[:, None]
    return {"left": t >= 11 - lengths, "right": t < lengths}


@EACH
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, options, side):
    """Whole, then goes on from the state; what stands at padding does not matter."""
    model, mask, tokens, more = build(name, **options), masks()[side], draw(4, 11), draw(4, 5)
    alone = []
    for row in range(4):
        state = model.init_state(1)
        first, state = model.scan(tokens[row][mask[row]][None], state)
        second, _ = model.scan(more[row : row + 1], state)
        alone.append((first[0], second[0]))
    for garbage in (0, 5):
        given = tokens.masked_fill(~mask, garbage)
        logits = model(given, mask=mask)
        scanned, state = model.scan(given, model.init_state(4), mask=mask)
        following, _ = model.scan(more, state)
        stream = model.init_state(4, capacity=16)
        stepped = model.step_(given, stream, mask=mask)
        next_steps = torch.cat([model.step_(more[:, t : t + 1], stream) for t in range(5)], 1)
        for row in range(4):
            for found in (logits, scanned, stepped):
                assert close(found[row][mask[row]], alone[row][0])
            assert close(following[row], alone[row][1]) and close(next_steps[row], alone[row][1])
        assert state.seen.tolist() == mask.sum(1).tolist() == [n - 5 for n in stream.seen.tolist()]


@EACH
def test_rows_go_on_by_different_numbers_of_tokens(name, options):
    model, tokens = build(name, **options), draw(3, 12)
    state = model.init_state(3)
    got: list[list[Tensor]] = [[], [], []]
    at = [0, 0, 0]
    for counts, side in (((2, 4, 0), "left"), ((4, 5, 1), "right"), ((0, 0, 0), "left"), ((6, 3, 11), "left")):
        width = max(*counts, 1)
        chunk, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.bool)
        for row, n in enumerate(counts):
            place = slice(width - n, width) if side == "left" else slice(0, n)
            chunk[row, place], mask[row, place] = tokens[row, at[row] : at[row] + n], True
        logits, state = model.scan(chunk, state, mask=mask)
        for row, n in enumerate(counts):
            got[row].append(logits[row][mask[row]])
            at[row] += n
    assert state.seen.tolist() == at == [12, 12, 12]
    assert close(torch.stack([torch.cat(parts) for parts in got]), model(tokens))


@EACH
@pytest.mark.parametrize("lengths", [(5, 9, 1, 20), (35,), (0, 3, 0, 32, 0)])
def test_packed_sequences_do_not_see_each_other(name, options, lengths):
    model, tokens = build(name, **options), draw(1, 35)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    packed = model(tokens, cu_seqlens=borders)
    alone = [model(part) for part in tokens.split(list(lengths), 1) if part.shape[1]]
    assert close(packed, torch.cat(alone, 1))
    parameters = list(model.parameters())
    weights = torch.randn_like(packed)
    found = torch.autograd.grad((packed * weights).sum(), parameters)
    expected = torch.autograd.grad((torch.cat(alone, 1) * weights).sum(), parameters)
    assert all(close(a, b, 1e-9) for a, b in zip(found, expected, strict=True))


@EACH
def test_a_stream_is_forked_saved_and_restored(name, options, tmp_path):
    model, tokens, more = build(name, **options), draw(2, 9), draw(4, 6)
    _, state = model.scan(tokens, model.init_state(2))
    rows = torch.tensor([1, 0, 1, 1])
    branches = fork(state, rows)
    logits, _ = model.scan(more, branches)
    whole = model(torch.cat([tokens[rows], more], 1))[:, 9:]
    assert close(logits, whole)
    path = tmp_path / "stream.safetensors"
    save_stream(state, path)
    restored = load_stream(model, path)
    assert close(model.scan(more, fork(restored, rows))[0], whole)
    # The branches are their own: what one does to its memory no other sees.
    kept = {key: tensor.clone() for key, tensor in state.tensors().items()}
    model.step_(more, fork(model.init_state(4, capacity=6), torch.arange(4)))
    assert all(torch.equal(tensor, kept[key]) for key, tensor in state.tensors().items())
    torch.save(state.tensors(), tmp_path / "state.pt")
    again = state.replaced(torch.load(tmp_path / "state.pt", weights_only=True))
    assert close(model.scan(more, fork(again, rows))[0], whole)


def test_a_stream_of_another_model_is_refused(tmp_path):
    path = tmp_path / "stream.safetensors"
    save_stream(build("gpt_smoke").init_state(2, capacity=3), path)
    with pytest.raises(DataError, match="another model"):
        load_stream(build("rwkv_smoke"), path)
    with pytest.raises(DataError, match=r"0\.keys"):
        load_stream(build("gpt_smoke", n_kv_heads=4), path)
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="cannot be read"):
        load_stream(build("gpt_smoke"), path)
    with pytest.raises(DataError, match="there is no file"):
        load_stream(build("gpt_smoke"), tmp_path / "absent")


@EACH
def test_bad_input_is_refused_in_words(name, options):
    model = build(name, **options)
    for bad in (-1, VOCAB):
        with pytest.raises(DataError, match=f"from 0 to {VOCAB - 1}"):
            model(torch.tensor([[1, bad]]))
    with pytest.raises(DataError, match="whole numbers"):
        model(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="bool"):
        model(draw(2, 3), mask=torch.ones(2, 3))
    with pytest.raises(ConfigError, match="2 rows of tokens and 3 of state"):
        model.scan(draw(2, 3), model.init_state(3))
    with pytest.raises(ConfigError, match="2 rows of tokens and 3 of state"):
        model.step_(draw(2, 3), model.init_state(3, capacity=9))


@pytest.mark.parametrize("name", ["gpt_smoke", "jamba_smoke", "hyena_smoke"])
def test_no_room_is_said(name):
    model = build(name)
    state = model.init_state(2, capacity=4)
    model.step_(draw(2, 3), state)
    with pytest.raises(ConfigError, match="room for 4 positions and was given 3 positions and 2 more"):
        model.step_(draw(2, 2), state)
    mask = torch.tensor([[False, True], [True, True]])
    with pytest.raises(DataError, match="room for 4 positions and 5 are needed"):
        model.step_(draw(2, 2), state, mask=mask)


def test_a_filter_has_an_end():
    model = build("hyena_smoke", seq_len=16)
    with pytest.raises(ConfigError, match="seq_len=16"):
        model(draw(1, 17))
    with pytest.raises(ConfigError, match="seq_len=16"):
        model.init_state(1, capacity=17)


@EACH
def test_bfloat16_autocast_stays_near(name, options):
    torch.manual_seed(1)
    model = models.build(Spec(name, **options), {"vocab_size": VOCAB}).eval()
    tokens = draw(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(tokens)
    wanted = model(tokens)
    assert low.isfinite().all() and (low.float() - wanted).abs().max() <= 0.06 * wanted.abs().max()


@EACH
def test_the_whole_model_in_bfloat16(name, options):
    torch.manual_seed(1)
    model = models.build(Spec(name, **options), {"vocab_size": VOCAB}).eval()
    tokens = draw(2, 20)
    model = model.bfloat16()
    wanted = copy.deepcopy(model).float()(tokens)
    low = model(tokens)
    assert low.dtype == torch.bfloat16 and (low.float() - wanted).abs().max() <= 0.06 * wanted.abs().max()
    state = model.init_state(2, capacity=20)
    stepped = torch.cat([model.step_(tokens[:, :13], state), model.step_(tokens[:, 13:], state)], 1)
    assert stepped.dtype == torch.bfloat16 and (stepped.float() - wanted).abs().max() <= 0.06 * wanted.abs().max()


@pytest.mark.compile
@pytest.mark.parametrize("name", ["mamba_lm_smoke", "rwkv_smoke", "hyena_smoke"])
def test_compiles_into_one_graph(name):
    torch.compiler.reset()
    model, tokens = build(name), draw(2, 12)
    assert close(torch.compile(model, fullgraph=True, backend="aot_eager")(tokens), model(tokens), 1e-9)
