"""Folders in the Hugging Face layout: there and back, in shards, and what is refused; the command that reads them."""

import json
import math
import pickle
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import selectra.models  # noqa: F401
from selectra.cli import app
from selectra.compat.language import MambaConfig, MambaLMHeadModel
from selectra.errors import ConfigError, DataError
from selectra.language.checkpoint import INDEX, end_tokens, from_pretrained, save_pretrained
from selectra.language.model import LanguageModel
from selectra.language.tokens import Bytes
from selectra.registry import models
from selectra.spec import Spec

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (pip install 'selectra[language]')")

NAMES = [name for name in models.names("language") if name.endswith("_smoke")]


def build(name: str = "mamba_lm_smoke", **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    return models.build(Spec(name, **options), {"vocab_size": 256}).eval()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"tied": True}, {"tied": False}])
def test_a_model_comes_back_as_it_was(name, options, tmp_path):
    model, tokens = build(name, **options), torch.randint(256, (2, 7))
    save_pretrained(model, tmp_path, max_shard_size="8KB")
    assert (tmp_path / INDEX).is_file() and len(list(tmp_path.glob("*.safetensors"))) > 2
    again = from_pretrained(tmp_path)
    assert type(again) is type(model) and not again.training
    assert torch.equal(again(tokens), model(tokens))
    assert from_pretrained(tmp_path, dtype="bfloat16").embedding.weight.dtype == torch.bfloat16


def test_what_was_in_a_folder_before_does_not_stay(tmp_path):
    """Neither here nor for `transformers`, which looks for a single file first."""
    tokens = torch.randint(256, (1, 7))
    for name, size in (("gpt_smoke", "8KB"), ("mamba_lm_smoke", "5GB"), ("rwkv_smoke", "8KB"), ("gpt_smoke", "9KB")):
        model = build(name)
        save_pretrained(model, tmp_path, max_shard_size=size)
        assert torch.equal(from_pretrained(tmp_path)(tokens), model(tokens))
        kept = {path.name for path in tmp_path.glob("model*")}
        named = {INDEX, *json.loads((tmp_path / INDEX).read_text())["weight_map"].values()} if size != "5GB" else set()
        assert kept == (named or {"model.safetensors"})


@pytest.mark.parametrize("size", ["5GB", "8KB"])
def test_a_folder_without_room_is_said_in_words(size, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        with pytest.raises(DataError, match=r"could not be written into .*: File too large"):
            save_pretrained(build("gpt_smoke"), tmp_path, max_shard_size=size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"could not be written into .*File exists"):
        save_pretrained(build("gpt_smoke"), tmp_path / "file", max_shard_size=size)


def test_of_a_single_file_and_shards_the_single_file_is_read(tmp_path):
    shards, single = build("rwkv_smoke"), build("rwkv_smoke", tied=False)
    torch.nn.init.ones_(single.embedding.weight)
    save_pretrained(single, tmp_path / "single")
    save_pretrained(shards, tmp_path, max_shard_size="8KB")
    (tmp_path / "single" / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert torch.equal(from_pretrained(tmp_path).embedding.weight, single.embedding.weight)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_that_end_a_text_are_kept(name, tmp_path):
    save_pretrained(build(name), tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    # Said: `transformers` has tokens of its own choice for what is not.
    assert [config[f"{what}_token_id"] for what in ("pad", "bos", "eos")] == [None] * 3
    change(tmp_path / "own", eos_token_id=7, bos_token_id=3)
    save_pretrained(from_pretrained(tmp_path / "own"), tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert [config[f"{what}_token_id"] for what in ("pad", "bos", "eos")] == [None, 3, 7]
    assert end_tokens(tmp_path / "again") == {7}
    # What generation is told wins.
    (tmp_path / "own" / "generation_config.json").write_text('{"eos_token_id": [9, 8]}')
    save_pretrained(from_pretrained(tmp_path / "own"), tmp_path / "again")
    assert end_tokens(tmp_path / "again") == {8, 9}
    (tmp_path / "own" / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(DataError, match="eos_token_id is '</s>'; it must be the id"):
        from_pretrained(tmp_path / "own")


def test_the_type_of_the_weights_is_kept(tmp_path):
    save_pretrained(build().bfloat16(), tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert {p.dtype for p in from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    config = json.loads((tmp_path / "config.json").read_text())
    # As older versions say it, or not at all.
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert from_pretrained(tmp_path).embedding.weight.dtype == torch.bfloat16
    del config["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert from_pretrained(tmp_path).embedding.weight.dtype == torch.bfloat16


class Made(TorchDispatchMode):
    """Notes the types of everything of some size that has memory."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and not found.is_meta and found.numel() >= 64:
            self.dtypes.add(found.dtype)
        return found


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_made_in_their_own_type_alone(name, tmp_path):
    save_pretrained(build(name).bfloat16(), tmp_path)
    with Made() as made:
        from_pretrained(tmp_path)
    # The files themselves are read as bytes.
    assert torch.bfloat16 in made.dtypes and made.dtypes <= {torch.bfloat16, torch.uint8}


def test_mamba_ssms_folder_is_read(tmp_path):
    config = {"d_model": 12, "n_layer": 2, "vocab_size": 21, "ssm_cfg": {"layer": "Mamba2", "headdim": 4}}
    theirs = MambaLMHeadModel(MambaConfig(**config)).eval()
    theirs.save_pretrained(str(tmp_path))
    tokens = torch.randint(21, (2, 9))
    assert torch.allclose(from_pretrained(tmp_path)(tokens), theirs(tokens).logits, atol=1e-5)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "executed")


def test_nothing_in_a_folder_is_executed(tmp_path):
    save_pretrained(build(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    victim = tmp_path / "victim"
    torch.save({"backbone.embeddings.weight": torch.zeros(2), "x": Evil(victim)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="could run its code"):
        from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(victim)))
    with pytest.raises(DataError):
        from_pretrained(tmp_path)
    assert not victim.exists()


def change(folder: Path, **options: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def test_folders_that_do_not_fit_are_refused_in_words(tmp_path):
    with pytest.raises(DataError, match=r"there is no '.*config\.json'"):
        from_pretrained(tmp_path)
    save_pretrained(build(tied=False), tmp_path)
    change(tmp_path, model_type="mamba3")
    with pytest.raises(ConfigError, match=r"model_type 'mamba3'; there are .*jamba.*Did you mean 'mamba"):
        from_pretrained(tmp_path)
    change(tmp_path, model_type="mamba", vocab_size=300)
    with pytest.raises(DataError, match=r"vocabulary has 300 tokens and 'backbone\.embeddings\.weight' has 256"):
        from_pretrained(tmp_path)
    for size in ("abc", None, [3]):
        change(tmp_path, vocab_size=size)
        with pytest.raises(ConfigError, match=re.escape(f"option 'vocab_size' is {size!r}, which is no int")):
            from_pretrained(tmp_path)
    change(tmp_path, vocab_size=256, hidden_size=24)
    with pytest.raises((DataError, ConfigError), match=r"24|intermediate_size"):
        from_pretrained(tmp_path)
    change(tmp_path, hidden_size=16, mystery=1)
    with pytest.raises(ConfigError, match="no supported option 'mystery'"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="no JSON"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DataError, match="no JSON object"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "option"),
    [("mamba_lm_smoke", "expand"), ("mamba_lm_smoke", "layer_norm_epsilon"), ("jamba_smoke", "mamba_expand")],
)
def test_a_number_that_is_none_is_named(name: str, option: str, number: float, tmp_path: Path) -> None:
    """JSON of Python holds NaN and Infinity, as words and as Hugging Face writes them."""
    save_pretrained(build(name), tmp_path)
    for written in (number, {"__float__": str(number).replace("inf", "Infinity")}):
        change(tmp_path, **{option: written})
        with pytest.raises(ConfigError, match=f"option '{option}' is {number}; it must be a finite number"):
            from_pretrained(tmp_path)


def test_a_range_may_be_open_and_holds_numbers(tmp_path: Path) -> None:
    save_pretrained(build("mamba_lm_smoke", mixer="mamba2", d_head=8, d_state=8), tmp_path)
    assert from_pretrained(tmp_path) is not None
    change(tmp_path, time_step_limit=[0.0, math.nan])
    with pytest.raises(ConfigError, match=r"option 'time_step_limit' is \(0.0, nan\); each must be a number"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_a_number_that_is_none_in_mamba_ssms_layout_is_named(layer: str, number: float, tmp_path: Path) -> None:
    ssm = {"layer": layer, "d_state": 8, "expand": number}
    config = {"d_model": 16, "n_layer": 1, "vocab_size": 256, "ssm_cfg": ssm}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"backbone.embedding.weight": torch.zeros(256, 16)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"expand.*{number}"):
        from_pretrained(tmp_path)


def test_missing_and_damaged_weights_are_named(tmp_path):
    save_pretrained(build(), tmp_path, max_shard_size="8KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    content = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(DataError, match=rf"lacks {shards[1].name}, 1 of {len(shards)} shards"):
        from_pretrained(tmp_path)
    shards[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"{shards[1].name}' cannot be read"):
        from_pretrained(tmp_path)
    shards[1].write_bytes(content)
    state = load_file(shards[1])
    key = sorted(state)[0]
    save_file({name: value for name, value in state.items() if name != key} or {"x": torch.zeros(1)}, shards[1])
    with pytest.raises(DataError, match=f"has no '{key}'"):
        from_pretrained(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"][key] = "../elsewhere.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(DataError, match="not in the folder itself"):
        from_pretrained(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(DataError, match="no index of shards"):
        from_pretrained(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(DataError, match="has no weights"):
        from_pretrained(tmp_path)


def test_what_a_layout_has_no_place_for_is_said(tmp_path):
    with pytest.raises(ConfigError, match="RMS norms alone"):
        save_pretrained(build(norm="layer"), tmp_path)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_continues_prompts(tmp_path):
    save_pretrained(build("rwkv_smoke"), tmp_path)
    Bytes().save(tmp_path)
    alone = run(tmp_path, "Hello", "--max-new-tokens", 12, "--temperature", 1.0, "--seed", 3)
    assert alone.startswith("Hello") and len(alone) > 6
    assert alone == run(tmp_path, "Hello", "--max-new-tokens", 12, "--temperature", 1.0, "--seed", 3)
    assert alone != run(tmp_path, "Hello", "--max-new-tokens", 12, "--temperature", 1.0, "--seed", 4)
    (tmp_path / "more.txt").write_text("a third\n\na fourth\n")
    several = run(tmp_path, "[b]one[/b]", "two", "--file", tmp_path / "more.txt", "--max-new-tokens", 3)
    assert all(f"{n} {text}" in several for n, text in enumerate(("[b]one[/b]", "two", "a third", "a fourth"), 1))


def test_the_command_refuses_in_words(tmp_path):
    save_pretrained(build("rwkv_smoke"), tmp_path)
    for arguments, message in (
        (["x"], "--tokenizer"),
        ([], "no prompt"),
        (["x", "--tokenizer", "bytes", "--temperature", "0", "--top-k", "3"], "no effect"),
        (["x", "--tokenizer", "bytes", "--device", "tpu9"], "device"),
        (["", "--tokenizer", "bytes"], "prompt 1 of 1 is empty"),
    ):
        with pytest.raises((DataError, ConfigError), match=message):
            CliRunner().invoke(app, ["generate", str(tmp_path), *arguments], catch_exceptions=False)
    small = models.build(Spec("rwkv_smoke"), {"vocab_size": 100})
    save_pretrained(small, tmp_path / "small")
    with pytest.raises(DataError, match="tokenizer has 256 tokens and the model 100"):
        CliRunner().invoke(
            app, ["generate", str(tmp_path / "small"), "x", "--tokenizer", "bytes"], catch_exceptions=False
        )
