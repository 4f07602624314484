"""Settings: their sources, which source wins, and the errors for wrong ones."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from server import cli
from server.app import app
from server.cli import serve
from server.job import Lane
from server.settings import Settings, SettingsError, flag_of, load_settings


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MTLORA_")]:
        monkeypatch.delenv(name)


def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(f"adapters: {tmp_path}\nmax_num_seqs: 5\nport: 7\nmax_model_len: 128\nenforce_eager: false\n")
    monkeypatch.setenv("MTLORA_MAX_NUM_SEQS", "6")
    monkeypatch.setenv("MTLORA_PORT", "8")
    settings = load_settings({"max_num_seqs": "4"}, config)
    assert (settings.max_num_seqs, settings.port, settings.max_model_len) == (4, 8, 128)
    assert settings.enforce_eager is False
    assert settings.grace_period_s == 30
    assert settings.in_flight_limit == 16


@pytest.mark.parametrize(
    ("flags", "texts", "images"),
    [
        ({}, 64, 16),
        ({"data_parallel_size": 4}, 256, 16),
        ({"vision_backbone": "v", "vision_data_parallel_size": 8}, 64, 128),
    ],
)
def test_several_engines_run_more_at_a_time(flags: dict[str, object], texts: int, images: int) -> None:
    settings = load_settings({"allow_no_tasks": True, **flags})
    assert (settings.running_texts, settings.running_images) == (texts, images)
    assert settings.in_flight_limit == 4 * max(texts, images if settings.vision_backbone else 1)
    turns = app._turns(settings)
    assert (turns[Lane.TEXT].most, turns[Lane.IMAGES].most) == (texts + texts // 8, images + images // 8)


@pytest.mark.parametrize(
    ("flags", "limit"), [({}, 1 << 20), ({"vision_backbone": "v"}, 16 << 20), ({"max_message_bytes": 4096}, 4096)]
)
def test_the_limit_of_messages_has_room_for_photographs(flags: dict[str, object], limit: int) -> None:
    assert load_settings({"allow_no_tasks": True, **flags}).message_limit == limit


@pytest.mark.parametrize(
    ("flags", "name", "found", "allowed"),
    [
        ({"max_num_seqs": "0"}, "max_num_seqs", "'0' (flag --max-num-seqs)", "greater than or equal to 1"),
        ({"port": "70000"}, "port", "'70000'", "less than or equal to 65535"),
        ({"dtype": "int8"}, "dtype", "'int8'", "'bfloat16'"),
        ({"kv_cache_gib": "inf"}, "kv_cache_gib", "'inf'", "finite"),
        ({"kv_cache_gib": "-1"}, "kv_cache_gib", "'-1'", "greater than 0"),
        ({"grace_period_s": "soon"}, "grace_period_s", "'soon'", "valid number"),
        ({"adapters": "/no/such/folder"}, "adapters", "'/no/such/folder'", "existing folder"),
        (
            {"adapters": "gopher://adapters"},
            "adapters",
            "'gopher://adapters'",
            "allowed: a folder, or a URL that fsspec",
        ),
        ({"adapter_slots": "0"}, "adapter_slots", "'0'", "greater than or equal to 1"),
        ({"engine_hang_s": "0"}, "engine_hang_s", "'0'", "greater than or equal to 1"),
        ({"max_num_batched_tokens": "8", "max_num_seqs": "9"}, "max_num_batched_tokens", "8", "at least max_num_seqs"),
        ({"adapters": None}, "adapters", "not set", "allow_no_tasks"),
        ({"adapters_read_only": "true"}, "adapters_read_only", "writable", "a volume that is read-only"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_found_and_what_is_allowed(
    tmp_path: Path, flags: dict[str, str], name: str, found: str, allowed: str
) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings({"adapters": tmp_path} | flags)
    message = str(error.value)
    assert message.startswith(name)
    assert found in message
    assert allowed in message


def test_all_wrong_settings_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings({"adapters": tmp_path, "port": "-1", "log_level": "loud"})
    assert {line.split(":")[0] for line in str(error.value).splitlines()} == {"port", "log_level"}


def test_an_error_says_where_a_wrong_setting_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("max_model_len: 1\n")
    monkeypatch.setenv("MTLORA_PORT", "x")
    with pytest.raises(SettingsError) as error:
        load_settings({"adapters": tmp_path}, config)
    assert "environment variable MTLORA_PORT" in str(error.value)
    assert f"file {config}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_num_seq: 3", "max_num_seq: no such setting (file"),
        ("- a\n- b", "a list; allowed: a mapping"),
        ("a: [", "not a readable YAML file"),
    ],
)
def test_an_error_says_what_is_wrong_with_a_file(tmp_path: Path, text: str, expected: str) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(text)
    with pytest.raises(SettingsError) as error:
        load_settings({"adapters": tmp_path}, config)
    assert expected in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="not a readable YAML file"):
        load_settings({"adapters": tmp_path}, tmp_path / "none.yaml")


def test_a_near_miss_is_suggested(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("max_num_seq: 3")
    with pytest.raises(SettingsError, match="did you mean max_num_seqs"):
        load_settings({"adapters": tmp_path}, config)


def test_wrong_settings_and_help_need_no_import_of_vllm() -> None:
    for arguments, status in ((["--max-num-seqs", "0"], 2), (["serve", "--help"], 0)):
        command = [sys.executable, "-X", "importtime", "-m", "server", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == status
        assert "max_num_seqs" in done.stderr or "--max-num-seqs" in done.stdout
        assert re.search(r"\| +pydantic$", done.stderr, re.MULTILINE)
        assert not re.search(r"\| +(vllm|torch)$", done.stderr, re.MULTILINE)


def test_help_has_every_setting_with_its_description_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert field.description
        default = "unset" if field.default is None else field.default
        flag = flag_of(name)
        assert f"{flag} " in shown
        assert f"{field.description} (default: {default})" in shown
    assert "--log-prompts, --no-log-prompts" in shown
    assert "--enforce-eager, --no-enforce-eager" in shown


def test_flags_reach_the_settings_as_they_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTLORA_PORT", "8")
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    flags = ["--adapters", str(tmp_path), "--port", "9", "--no-enable-prefix-caching", "--enforce-eager"]
    settings = serve.settings_from(parser.parse_args(flags))
    assert (settings.port, settings.enable_prefix_caching, settings.enforce_eager) == (9, False, True)
    assert settings.model_fields_set == {"adapters", "port", "enable_prefix_caching", "enforce_eager"}


def test_an_empty_flag_is_wrong_where_an_empty_variable_is_not_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MTLORA_HOST", "")
    assert load_settings({"adapters": tmp_path}).host == "127.0.0.1"
    assert cli.main(["--adapters", str(tmp_path), "--host", ""]) == 2
    assert "host: found '' (flag --host)" in capsys.readouterr().err
