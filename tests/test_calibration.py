"""Calibration: what is learned is what the model caches; a file of something else is refused before any output."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Switch, make_prompt, make_tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from vericache_compile import calibrate, stats
from vericache_compile.calibration import Calibration, read
from vericache_compile.cli import main
from vericache_compile.compressors.cskv import CSKV
from vericache_compile.compressors.kvquant import KVQuant
from vericache_compile.compressors.kvsharer import KVSharer
from vericache_compile.compressors.low_rank import Bases
from vericache_compile.compressors.observed import observe, sample
from vericache_compile.compressors.recalkv import ReCalKV
from vericache_compile.compressors.rotation import Rotation
from vericache_compile.compressors.spec import parse
from vericache_compile.errors import OptionError, VericacheError
from vericache_compile.learning import rows_of, turns_of
from vericache_compile.model_state import state_of
from vericache_compile.plan import Site

METHODS = ("recalkv", "cskv", "cskv(bits=4)", "kvquant", "kvsharer(share=0.4)")
FIX = "vericache calibrate --compressor"


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return make_prompt(64, 3)["input_ids"][:2]


@pytest.fixture(scope="module")
def turned(text: torch.Tensor) -> list[Rotation | None]:
    """How the tiny llama turns keys."""
    return turns_of(make_tiny("llama", layers=3), text)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, text: torch.Tensor) -> dict[str, Path]:
    """One file per method, of the tiny llama."""
    folder, model = tmp_path_factory.mktemp("calibrated"), make_tiny("llama", layers=3)
    made = {method: folder / f"{i}.safetensors" for i, method in enumerate(METHODS)}
    for method, path in made.items():
        calibrate(model, text, method, path)
    return made


@pytest.fixture(scope="module")
def switched() -> tuple[PreTrainedModel, Switch]:
    model, switch = make_tiny("llama", layers=3), Switch()
    model.compile(backend=switch)
    return model, switch


def _spelled(method: str, path: Path) -> str:
    name, _, rest = method.partition("(")
    return f"{name}(calibration='{path}'{', ' + rest if rest else ')'}"


@pytest.mark.parametrize("method", [pytest.param(METHODS[0], marks=pytest.mark.slow), *METHODS[1:]])
def test_tokens_are_plain_with_a_calibrated_method(
    switched: tuple[PreTrainedModel, Switch], files: dict[str, Path], method: str, plain_tokens: Any
) -> None:
    model, switch = switched
    compressor = _spelled(method, files[method])
    switch.options = {"compressor": compressor, "window": 4, "inductor": False}
    ours = model.generate(**make_prompt(300, 3), max_new_tokens=30, do_sample=False)
    assert torch.equal(ours, plain_tokens("llama", 300, 3, 30, layers=3))
    assert stats(model)["rounds"] > 0
    assert str(files[method]) in stats(model)["compressor"]


@pytest.mark.parametrize("method", ["recalkv", "cskv", "kvquant"])
def test_a_calibrated_method_leaves_its_residual_to_the_tail(files: dict[str, Path], method: str) -> None:
    spelled = f"{method}(residual=100, calibration='{files[method]}')"
    assert parse(spelled, {}).for_layer(0, 3).least_tail == 100


@pytest.mark.parametrize("method", ["recalkv", "kvquant"])
def test_a_file_full_of_nan_costs_no_token(
    switched: tuple[PreTrainedModel, Switch], files: dict[str, Path], tmp_path: Path, method: str, plain_tokens: Any
) -> None:
    model, switch = switched
    path = tmp_path / "nan.safetensors"
    with safe_open(files[method], "pt") as file:
        metadata = file.metadata()
    spoilt = {
        name: torch.full_like(held, float("nan")) if held.is_floating_point() and name != "fisher" else held
        for name, held in load_file(files[method]).items()
    }
    save_file(spoilt, path, metadata=metadata)
    switch.options = {"compressor": _spelled(method, path), "window": 4, "inductor": False}
    ours = model.generate(**make_prompt(300, 3), max_new_tokens=30, do_sample=False)
    assert torch.equal(ours, plain_tokens("llama", 300, 3, 30, layers=3))


def test_what_is_observed_is_what_the_model_caches(text: torch.Tensor) -> None:
    model = make_tiny("llama", layers=3)
    cache = model(text[:1], use_cache=True).past_key_values
    seen = dict(observe(model, text[:1]))
    assert sorted(seen) == [0, 1, 2]
    for layer, mine in seen.items():
        torch.testing.assert_close(mine.keys, cache.layers[layer].keys[0])
        torch.testing.assert_close(mine.values, cache.layers[layer].values[0])


def test_keys_are_observed_as_before_rope(text: torch.Tensor, turned: list[Rotation | None]) -> None:
    """They are what the projection of the keys gives."""
    model, kept = make_tiny("llama", layers=3), []
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda module, args, out: kept.append(out))
    seen = dict(observe(model, text[:1], turned))[1]
    torch.testing.assert_close(seen.keys, kept[0][0].unflatten(1, (2, 16)).transpose(0, 1), atol=1e-5, rtol=1e-4)


def test_asking_how_keys_are_turned_leaves_no_statistics_behind(text: torch.Tensor) -> None:
    model = make_tiny("llama", layers=3)
    assert turns_of(model, text)[0] is not None
    with pytest.raises(VericacheError, match="has not run under vericache"):
        stats(model)


def test_statistics_stay_the_users_where_asking_fails(
    text: torch.Tensor, switched: tuple[PreTrainedModel, Switch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, switch = switched
    switch.options = {"compressor": "none", "window": 4, "inductor": False}
    model.generate(**make_prompt(20), max_new_tokens=8, do_sample=False)
    state = state_of(list(model.parameters()))
    assert state is not None
    latest = state.latest

    def fail(*args: Any, **more: Any) -> None:
        state.latest = None
        raise RuntimeError("in the middle")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        turns_of(model, text)
    assert state.latest is latest


def test_gradients_are_those_of_the_loss(text: torch.Tensor) -> None:
    """By a difference: a little more of one cached number, and the loss changes by its gradient times that."""
    from transformers import DynamicCache

    model = make_tiny("llama", layers=3).double()
    seen = dict(observe(model, text[:1], gradients=True))[1]

    def loss(push: float) -> float:
        cache = DynamicCache()
        update = cache.update

        def pushed(keys: torch.Tensor, values: torch.Tensor, layer: int, *rest: Any, **more: Any) -> Any:
            keys, values = update(keys, values, layer, *rest, **more)
            if layer == 1:
                keys = keys.clone()
                keys[0, 1, 5, 3] += push
            return keys, values

        cache.update = pushed
        with torch.no_grad():
            logits = model(text[:1], past_key_values=cache, use_cache=True).logits  # its own loss is in float32
            return float(torch.nn.functional.cross_entropy(logits[0, :-1], text[0, 1:]))

    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    assert slope != 0
    assert float(seen.key_gradients[1, 5, 3]) == pytest.approx(slope, rel=0.01)  # norms are in float32
    assert all(each.requires_grad and each.grad is None for each in model.parameters())


def test_bases_in_the_file_are_those_of_the_text(
    files: dict[str, Path], text: torch.Tensor, turned: list[Rotation | None]
) -> None:
    """Keys of the text, as before RoPE, lose no more in the file's basis than in the best one of all rows together."""
    held = read(str(files["recalkv"]), "recalkv")
    whole = [seen.keys for layer, seen in observe(make_tiny("llama", layers=3), text, turned) if layer == 1]
    keys = torch.cat([each.transpose(0, 1).flatten(1) for each in whole])
    fit = Bases(*(held.part(f"1.{part}") for part in Bases._fields))
    basis = fit.keys[0, :, :8]
    assert fit.order.tolist() == [0, 1]
    best = torch.linalg.svdvals(keys)[8:].square().sum()
    torch.testing.assert_close((keys - keys @ basis @ basis.T).square().sum(), best, rtol=1e-3, atol=1e-3)
    assert held.part("fisher").shape == (3, 2)
    assert (held.part("fisher") > 0).all()


def test_a_calibrated_region_lends_its_bases(files: dict[str, Path]) -> None:
    method = ReCalKV(rank=0.5, calibration=str(files["recalkv"]))
    keys, values = torch.randn(2, 2, 100, 16, generator=torch.Generator().manual_seed(0))
    region = method.for_layer(1, 3).compress(keys, values, None)
    held = read(str(files["recalkv"]), "recalkv")
    given = held.part("1.keys").untyped_storage().data_ptr()
    longer = region.extend(keys, values, None)
    for each in (region, longer):
        assert any(part.untyped_storage().data_ptr() == given for part in each.fit)  # type: ignore[attr-defined]
        shares = method.shares(held, 1)
        ranks = sum(-(-int(share * 32) // 8) * 8 for share in shares)
        assert each.nbytes <= 4 * (each.covered * (ranks + 8) + 2 * 2 * 4 * 16)


@pytest.mark.parametrize("method", ["recalkv", "cskv(bits=4)", "kvquant"])
def test_a_file_of_another_dtype_serves(files: dict[str, Path], method: str) -> None:
    """It was made of float32 weights; the cache here is in bfloat16."""
    keys, values = torch.randn(2, 2, 300, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    made = parse(_spelled(method, files[method]), {}).for_layer(1, 3)
    region = made.compress(keys, values, None)
    longer = region.extend(keys[:, region.covered :], values[:, region.covered :], None)
    for each in (region, longer):
        assert each.covered > 0
        assert all(read.dtype == torch.bfloat16 for read in each.materialize())


@pytest.mark.parametrize("method", ["recalkv", "kvquant", "kvsharer(share=0.4)"])
def test_a_method_outlives_its_file(files: dict[str, Path], tmp_path: Path, method: str) -> None:
    path = tmp_path / "gone.safetensors"
    path.write_bytes(files[method].read_bytes())
    made = parse(_spelled(method, path), {})
    path.unlink()
    sites = [Site(layer, 4, 2, 16, 16, 0.25, torch.float32, None) for layer in range(3)]
    made.check_model(sites, [])
    assert [made.for_layer(layer, 3) for layer in range(3)] == [made.for_layer(layer, 3) for layer in range(3)]


def test_a_given_fit_is_made_for_a_cache_of_another_dtype_once(files: dict[str, Path]) -> None:
    """All regions share it, and the method counts it beside the file's tensors."""
    method = ReCalKV(calibration=str(files["recalkv"]))
    before, held = method.shared_nbytes, read(str(files["recalkv"]), "recalkv")
    keys, values = torch.randn(2, 2, 100, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    empty = method.for_layer(1, 3).compress(keys[:, :5], values[:, :5], None)
    assert empty.covered == 0
    others = (empty.extend(keys, values, None), method.for_layer(1, 3).compress(keys, values, None))
    made = method.typed(method.given(held, 1, 3), torch.bfloat16)
    for region in others:
        assert all(torch.equal(own, given) for own, given in zip(region.fit, made, strict=True))
        assert all(own is first for own, first in zip(region.fit, others[0].fit, strict=True))
        assert region.nbytes == sum(part.nbytes for part in (*region.sinks, *itertools.chain(*region.codes)))
    assert method.shared_nbytes == before + sum(part.nbytes for part in made if part.is_floating_point())


def test_a_file_that_several_sites_read_counts_once(files: dict[str, Path]) -> None:
    """Also where their methods differ; of what each has made of it, and of another file, nothing is left out."""
    paths = [str(files[method]) for method in ("recalkv", "cskv")]
    one, other = ReCalKV(calibration=paths[0]), CSKV(calibration=paths[1])
    text = "0: recalkv(rank={}, calibration='{}'), 1: recalkv(calibration='{}'), rest: cskv(calibration='{}')"
    made = parse(text.format(0.25, paths[0], *paths), {})
    assert made.shared_nbytes == one.shared_nbytes + other.shared_nbytes
    keys, values = torch.randn(2, 2, 100, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    fits = [made.for_layer(layer, 3).compress(keys, values, None).fit for layer in (0, 1)]  # type: ignore[attr-defined]
    copies = sum(part.nbytes for fit in fits for part in fit if part.is_floating_point())
    assert made.shared_nbytes == one.shared_nbytes + other.shared_nbytes + copies


def test_kvquant_weighs_by_fisher_information(
    files: dict[str, Path], text: torch.Tensor, turned: list[Rotation | None]
) -> None:
    held = read(str(files["kvquant"]), "kvquant")
    seen = sample(make_tiny("llama", layers=3), text, turned)[2]
    plain = KVQuant().fit(seen.keys, seen.values, None)
    torch.testing.assert_close(held.part("2.low"), plain[2])
    assert not torch.allclose(held.part("2.key_levels"), plain[0])


def test_kvsharer_keeps_pairs_within_its_cosine(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = read(str(files["kvsharer(share=0.4)"]), "kvsharer").part("pairs").tolist()
    assert len(pairs) <= 1
    assert all(0 <= lender < borrower < 3 for borrower, lender in pairs)
    monkeypatch.setattr("vericache_compile.compressors.kvsharer.COSINE", 1.1)
    assert KVSharer(share=0.4).learn(make_tiny("llama", layers=3), make_prompt(64)["input_ids"], ())["pairs"].shape == (
        0,
        2,
    )
    monkeypatch.setattr("vericache_compile.compressors.kvsharer.COSINE", -1.1)
    accepted = (
        KVSharer(share=0.67).learn(make_tiny("llama", layers=3), make_prompt(64)["input_ids"], ())["pairs"].tolist()
    )
    assert accepted in ([[2, 0], [1, 0]], [[1, 0], [2, 0]])


def test_a_file_says_what_it_is_of(files: dict[str, Path]) -> None:
    held = read(str(files["cskv(bits=4)"]), "cskv")
    assert held.method == "cskv"
    assert "bits=4" in held.parameters
    assert held.model["sites"] == [[2, 16, 16]] * 3
    assert len(held.model["config"]) == 64


def _wrong(path: Path, folder: Path, how: str) -> Path:
    made = folder / "wrong.safetensors"
    data = path.read_bytes()
    if how == "truncated":
        made.write_bytes(data[: len(data) // 2])
    elif how == "text":
        made.write_text("not safetensors")
    elif how == "no metadata":
        save_file(load_file(path), made)
    else:
        return folder / "missing.safetensors"
    return made


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("truncated", "not a whole safetensors file"),
        ("text", "not a whole safetensors file"),
        ("no metadata", "its format is None"),
        ("missing", "cannot be read: No such file"),
    ],
)
def test_a_broken_file_says_what_where_and_how_to_fix_it(
    files: dict[str, Path], tmp_path: Path, how: str, found: str
) -> None:
    path = _wrong(files["recalkv"], tmp_path, how)
    with pytest.raises(OptionError) as caught:
        ReCalKV(calibration=str(path))
    assert found in caught.value.found
    assert str(path) in caught.value.where
    assert FIX in caught.value.fix


def test_another_methods_file_is_refused(files: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match="it is of method 'cskv', not 'recalkv'"):
        ReCalKV(calibration=str(files["cskv"]))
    with pytest.raises(OptionError, match="16 levels for bits=2"):
        KVQuant(bits=2, calibration=str(files["kvquant"]))
    with pytest.raises(OptionError, match="calibration=3"):
        ReCalKV(calibration=3)  # type: ignore[arg-type]


def test_other_outliers_than_the_files_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    """Ranges are those of what these leave; a file that does not say how many is not whole."""
    path, unsaid = str(files["kvquant"]), tmp_path / "unsaid.safetensors"
    with pytest.raises(OptionError) as caught:
        KVQuant(outliers=0.01, calibration=path)
    assert caught.value.found == "ranges of outliers=0.02 for outliers=0.01"
    assert path in caught.value.where
    assert caught.value.fix == "give outliers=0.02, or calibrate again with kvquant(outliers=0.01)"
    with safe_open(path, "pt") as file:
        save_file(load_file(path), unsaid, metadata=file.metadata() | {"parameters": "KVQuant(bits=4)"})
    with pytest.raises(OptionError, match="does not say with which outliers"):
        KVQuant(calibration=str(unsaid))


@pytest.mark.parametrize(("written", "number"), [("0", 0), ("0.25", 0.25), ("1e-05", 1e-5), ("2.5e-06", 2.5e-6)])
def test_a_parameter_is_read_as_it_was_written(written: str, number: float) -> None:
    held = Calibration("", "m", {}, f"M(a={written}, other_a=3, b=1, calibration='a=7')", {})
    assert held.parameter("a") == number
    assert (held.parameter("other_a"), held.parameter("b")) == (3, 1)


def test_another_size_of_groups_than_the_files_is_refused(files: dict[str, Path]) -> None:
    """Up to `heads` of the model's two KV heads: one more than these makes the same groups."""
    path = str(files["recalkv"])
    for heads in (2, 3):
        ReCalKV(heads=heads, calibration=path)
    with pytest.raises(OptionError) as caught:
        ReCalKV(heads=1, calibration=path)
    assert caught.value.found == "groups of 2 heads, where heads=1 makes 1"
    assert path in caught.value.where
    assert caught.value.fix == "give heads=2, or calibrate again with recalkv(heads=1)"


@pytest.mark.parametrize("compressor", ["recalkv", "kvsharer"])
def test_another_models_file_is_refused_before_any_output(
    tmp_path: Path, text: torch.Tensor, compressor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "other.safetensors"
    calibrate(make_tiny("gpt2", layers=3), text, compressor, path)
    _refused(_spelled(compressor, path), "it is of a model with 3 layers of [4, 16, 16]")


def test_a_model_of_the_same_sites_and_another_width_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    model = make_tiny("llama", layers=3)
    model.resize_token_embeddings(128)
    calibrate(model, make_prompt(64)["input_ids"], "recalkv", path)
    _refused(_spelled("recalkv", path), "it is of another model")


def _refused(compressor: str, found: str) -> None:
    torch._dynamo.reset()
    model = make_tiny("llama", layers=3)
    model.compile(backend="vericache", options={"compressor": compressor, "inductor": False})
    with pytest.raises(Exception, match="calibration file") as caught:
        model.generate(**make_prompt(30), max_new_tokens=4, do_sample=False)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, OptionError):
        error = error.__cause__ or error.__context__
    assert error is not None
    assert error.found.startswith(found)
    assert FIX in error.fix


def test_a_changed_file_is_read_again(tmp_path: Path, text: torch.Tensor) -> None:
    path, model = tmp_path / "f.safetensors", make_tiny("llama", layers=3)
    calibrate(model, text, "cskv", path)
    before = read(str(path), "cskv")
    assert read(str(path), "cskv") is before
    calibrate(model, text.flip(1), "cskv", path)
    assert not torch.equal(read(str(path), "cskv").part("0.keys"), before.part("0.keys"))


def test_what_learns_nothing_or_cannot_be_written_is_refused(text: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"'snapkv' learns nothing[\s\S]*kvquant, recalkv, cskv, kvsharer"):
        calibrate(make_tiny("llama", layers=3), text, "snapkv", tmp_path / "f")
    with pytest.raises(OptionError, match="it cannot be written"):
        calibrate(make_tiny("llama", layers=3), text, "cskv", tmp_path / "no" / "folder")
    assert not list(tmp_path.iterdir())


def test_rows_are_spread_over_the_text() -> None:
    assert rows_of(torch.arange(100), 3, 10).tolist() == [list(range(b, b + 10)) for b in (0, 33, 66)]
    assert rows_of(torch.arange(25), 3, 10).shape == (2, 10)
    with pytest.raises(VericacheError, match="a text of 5 tokens"):
        rows_of(torch.arange(5), 3, 10)


def test_the_command_writes_a_file_that_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder, text, out = tmp_path / "model", tmp_path / "text.txt", tmp_path / "out.safetensors"
    make_tiny("llama", layers=3).save_pretrained(folder)
    words = {f"w{i}": i for i in range(90)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(folder)
    text.write_text(" ".join(f"w{7 * i % 90}" for i in range(200)))
    arguments = ["calibrate", "--model", str(folder), "--compressor", "cskv", "--text", str(text), "--out", str(out)]
    assert main([*arguments, "--rows", "2", "--tokens", "50", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["method"] == "cskv"
    assert said["pieces"] == 2
    assert read(str(out), "cskv").part("2.values").shape == (1, 32, 32)
    assert main(arguments) == 2
    assert "a text of 200 tokens" in capsys.readouterr().err
