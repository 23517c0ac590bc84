"""Options: every one checked, the environment below them, and errors that say what to write instead."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from vericache_compile.compressors.kivi import Kivi
from vericache_compile.compressors.none import NoCompression
from vericache_compile.compressors.snapkv import SnapKV
from vericache_compile.compressors.streaming import Streaming
from vericache_compile.compressors.table import COMPRESSORS
from vericache_compile.config import AUTO, DRAFT_DTYPES, MAX_WINDOW, Config, make_config
from vericache_compile.errors import OptionError
from vericache_compile.kernels import native

NAMES = [f.name for f in fields(Config)]


def refusal(options: dict[str, Any] | None, **environment: str) -> OptionError:
    """The error that options and environment give."""
    with pytest.raises(OptionError) as error:
        make_config(options, {f"VERICACHE_{name.upper()}": text for name, text in environment.items()})
    assert error.value.found
    assert error.value.where
    assert error.value.fix
    return error.value


def config(options: dict[str, Any] | None = None, **environment: str) -> Config:
    return make_config(options, {f"VERICACHE_{name.upper()}": text for name, text in environment.items()})


def test_defaults() -> None:
    assert config() == config({}) == Config()
    assert config() == Config(compressor="snapkv", keep=None, window=16, inductor=True, strict=False)
    assert config().make_compressor() == SnapKV()


def test_every_option_is_documented() -> None:
    assert all(f.metadata["doc"] for f in fields(Config))


def test_where_to_dump_makes_no_other_configuration(tmp_path: Path) -> None:
    assert config({"dump": tmp_path}).dump == config(dump=str(tmp_path)).dump == str(tmp_path)
    assert {config({"dump": "here"}): 1}[Config()] == 1
    assert {config({"trace": "here.json"}): 1}[Config()] == 1
    assert "name a folder" in refusal({"dump": " "}).fix
    assert "name a file" in refusal({"trace": ""}).fix
    assert "str or None" in refusal({"dump": 3}).fix


def test_a_config_is_a_key() -> None:
    """Sessions are found by their configuration."""
    assert {config({"keep": 0.5}): 1}[Config(keep=0.5)] == 1
    with pytest.raises(FrozenInstanceError):
        config().window = 8


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"compressor": "none"}, NoCompression()),
        ({"compressor": "streaming", "keep": 0.3}, Streaming(keep=0.3)),
        ({"compressor": "streaming", "keep": 1}, Streaming(keep=1)),
        ({"compressor": "snapkv", "keep": 0.05}, SnapKV(keep=0.05)),
        ({"keep": 0.05}, SnapKV(keep=0.05)),
        ({"compressor": "kivi"}, Kivi(bits=4)),
        ({"compressor": "kivi", "bits": 2}, Kivi(bits=2)),
        ({"compressor": "kivi", "keep": None, "bits": None}, Kivi(bits=4)),
    ],
)
def test_parameters_reach_the_compressor(options: dict[str, Any], expected: object) -> None:
    assert config(options).make_compressor() == expected


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("compresor", "compressor"),
        ("windows", "window"),
        ("kep", "keep"),
        ("bit", "bits"),
        ("Strict", "strict"),
        ("inducter", "inductor"),
    ],
)
def test_an_unknown_option_names_the_nearest(wrong: str, near: str) -> None:
    error = refusal({wrong: 1})
    assert wrong in error.found
    assert f"did you mean {near!r}?" in error.fix
    assert all(name in error.fix for name in NAMES)


@pytest.mark.parametrize("wrong", ["zzz", 3])
def test_an_unknown_option_like_no_other_lists_them_all(wrong: object) -> None:
    error = refusal({wrong: 1})
    assert "did you mean" not in error.fix
    assert all(name in error.fix for name in NAMES)


@pytest.mark.parametrize("window", [2, 4, 8, 16, 32, 64, 128, MAX_WINDOW])
def test_windows_are_powers_of_two(window: int) -> None:
    assert config({"window": window}).window == window


@pytest.mark.parametrize("window", [-4, 0, 1, 3, 6, 17, 255, 2 * MAX_WINDOW])
def test_other_windows_are_refused(window: int) -> None:
    error = refusal({"window": window})
    assert f"window={window}" in error.found
    assert f"2 to {MAX_WINDOW}" in error.fix
    assert f"window={window}" in refusal(None, window=str(window)).found


@pytest.mark.parametrize("name", ["device_memory_mb", "staging_mb", "link_gbps"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_sizes_and_rates_are_finite_and_above_zero(name: str, value: float) -> None:
    error = refusal({name: value})
    assert f"{name}={value}" in error.found
    assert "above 0" in error.fix


@pytest.mark.parametrize("name", [AUTO, *DRAFT_DTYPES])
def test_draft_types(name: str) -> None:
    assert config({"draft_dtype": name}).draft_dtype == config(draft_dtype=name).draft_dtype == name


@pytest.mark.parametrize("there", [True, False])
def test_draft_reads_int8_where_a_kernel_is_for_it_unless_told_otherwise(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "load", lambda: object() if there else None)
    monkeypatch.setattr("vericache_compile.config.multiplies_bfloat16", lambda: True)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert config({}).draft_dtype_on(cpu) is (torch.int8 if there else None)
    assert config({}).draft_dtype_on(gpu) is None
    assert config({"draft_dtype": "same"}).draft_dtype_on(cpu) is None
    assert config({"draft_dtype": "int8"}).draft_dtype_on(gpu) is torch.bfloat16
    assert config({"draft_dtype": "int8"}).draft_dtype_on(cpu) is (torch.int8 if there else torch.bfloat16)


@pytest.mark.parametrize("name", ["float32", "bf16", ""])
def test_other_draft_types_are_refused(name: str) -> None:
    error = refusal({"draft_dtype": name})
    assert "draft_dtype" in error.found
    assert all(allowed in error.fix for allowed in (AUTO, *DRAFT_DTYPES))


@pytest.mark.parametrize("keep", [0, 0.0, -0.1, 1.01, 2, float("nan"), float("inf")])
def test_fractions_to_keep_lie_between_zero_and_one(keep: float) -> None:
    for compressor in ("snapkv", "streaming"):
        error = refusal({"compressor": compressor, "keep": keep})
        assert "keep=" in error.found
        assert "(0, 1]" in error.fix


@pytest.mark.parametrize("bits", [0, 1, 3, 8])
def test_bits_are_two_or_four(bits: int) -> None:
    assert "2 or 4" in refusal({"compressor": "kivi", "bits": bits}).fix


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("compressor", 3, "str"),
        ("compressor", None, "str"),
        ("keep", "0.2", "float or None or int"),
        ("keep", True, "float or None or int"),
        ("bits", 2.0, "int or None"),
        ("bits", True, "int or None"),
        ("window", 16.0, "int"),
        ("window", "16", "int"),
        ("window", None, "int"),
        ("window", True, "int"),
        ("inductor", 1, "bool"),
        ("inductor", "off", "bool"),
        ("strict", None, "bool"),
    ],
)
def test_a_wrong_type_is_refused(name: str, value: object, allowed: str) -> None:
    error = refusal({name: value})
    assert error.found == f"{name}={value!r}"
    assert error.fix == f"give {allowed}"


def test_an_unknown_compressor_names_the_nearest() -> None:
    error = refusal({"compressor": "snapkw"})
    assert "did you mean 'snapkv'?" in error.fix
    assert ", ".join(COMPRESSORS) in error.fix


@pytest.mark.parametrize(
    ("compressor", "parameter", "fix"),
    [
        ("kivi", {"keep": 0.2}, "bits"),
        ("snapkv", {"bits": 2}, "keep"),
        ("streaming", {"bits": 4}, "keep"),
        ("none", {"keep": 0.5}, "takes no parameters"),
        ("none", {"bits": 2}, "takes no parameters"),
    ],
)
def test_a_parameter_that_the_method_does_not_take_is_refused(
    compressor: str, parameter: dict[str, float], fix: str
) -> None:
    error = refusal({"compressor": compressor, **parameter})
    assert next(iter(parameter)) in error.found
    assert compressor in error.where
    assert fix in error.fix


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"compressor": "streaming"}, Config(compressor="streaming")),
        ({"keep": "0.35"}, Config(keep=0.35)),
        ({"keep": "1"}, Config(keep=1.0)),
        ({"compressor": "kivi", "bits": "2"}, Config(compressor="kivi", bits=2)),
        ({"window": "8"}, Config(window=8)),
        ({"inductor": "0"}, Config(inductor=False)),
        ({"strict": "1"}, Config(strict=True)),
    ],
)
def test_the_environment_sets_options(environment: dict[str, str], expected: Config) -> None:
    assert config(None, **environment) == expected


@pytest.mark.parametrize("text", ["1", "true", "True", "ON", "yes"])
def test_words_for_on(text: str) -> None:
    assert config(strict=text).strict is True


@pytest.mark.parametrize("text", ["0", "false", "False", "OFF", "no"])
def test_words_for_off(text: str) -> None:
    assert config(inductor=text).inductor is False


@pytest.mark.parametrize(
    ("name", "text", "fix"),
    [
        ("strict", "maybe", "use 1 or 0"),
        ("inductor", "", "use 1 or 0"),
        ("window", "eight", "give one int"),
        ("window", "8.0", "give one int"),
        ("bits", "two", "give one int"),
        ("keep", "20%", "give one float"),
        ("keep", "", "give one float"),
    ],
)
def test_a_bad_environment_value_names_the_variable(name: str, text: str, fix: str) -> None:
    error = refusal(None, **{name: text})
    assert error.found == repr(text)
    assert f"VERICACHE_{name.upper()}" in error.where
    assert error.fix == fix


def test_an_explicit_option_wins() -> None:
    environment = {"compressor": "streaming", "keep": "0.5", "window": "8", "inductor": "0", "strict": "1"}
    options = {"compressor": "snapkv", "keep": 0.1, "window": 4, "inductor": True, "strict": False}
    assert config(options, **environment) == Config(**options)
    expected = Config(compressor="streaming", keep=0.5, window=4, inductor=False, strict=True)
    assert config({"window": 4}, **environment) == expected


def test_a_bad_environment_value_is_not_read_under_an_explicit_option() -> None:
    assert config({"window": 4}, window="four").window == 4


def test_the_environments_keep_does_not_break_an_explicit_kivi() -> None:
    assert config({"compressor": "kivi"}, keep="0.3") == Config(compressor="kivi")
    assert config({"compressor": "kivi", "bits": 2}, keep="0.3", bits="4") == Config(compressor="kivi", bits=2)
    assert config({"compressor": "none"}, keep="0.3", bits="4") == Config(compressor="none")
    assert config({"compressor": "streaming"}, keep="0.3", bits="4") == Config(compressor="streaming", keep=0.3)


def test_the_environment_must_agree_with_itself() -> None:
    assert "keep" in refusal(None, compressor="kivi", keep="0.3").found


def test_an_explicit_parameter_is_never_dropped() -> None:
    assert "keep" in refusal({"compressor": "kivi", "keep": 0.3}).found
    assert "keep" in refusal({"keep": 0.3}, compressor="kivi").found


def test_an_unknown_compressor_is_named_before_its_parameters() -> None:
    assert "snapkw" in refusal({"compressor": "snapkw"}, keep="0.3").found


def test_the_process_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERICACHE_WINDOW", "32")
    assert make_config(None).window == 32
    assert make_config({"window": 2}).window == 2


def test_option_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="where: the options of backend 'vericache'\n  fix: use a power of two"):
        make_config({"window": 5}, {})
