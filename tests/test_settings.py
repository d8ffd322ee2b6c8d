"""Every setting by its option and by its variable; a new field of Settings is tested without a change here."""

from __future__ import annotations

import argparse
import logging
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic.fields import FieldInfo

from service.settings import (
    PREFIX,
    Settings,
    SettingsError,
    add_options,
    check_exposure,
    load,
    option_of,
    warn_of_unknown,
)

FIELDS = Settings.model_fields
SPECIAL = {
    "device": ("cuda:1,cuda:0", "gpu"),
    "port": ("9000", "70000"),  # its bound is below the next number
    "allowed_hosts": ("maps.example.org,maps", "http://maps"),
    "cors_origins": ("https://a.test,https://b.test:8443", "a.test"),
}
OPEN = (str, Path)  # any text is a value


def samples(name: str, field: FieldInfo) -> tuple[str, str | None]:
    """A value that differs from the default, and a wrong one where there is any."""
    if name in SPECIAL:
        return SPECIAL[name]
    kind: Any = field.annotation
    if typing.get_origin(kind) is types.UnionType:
        (kind,) = (one for one in typing.get_args(kind) if one is not type(None))
    if typing.get_origin(kind) is Literal:
        return next(str(one) for one in typing.get_args(kind) if one != field.default), "nonsense"
    if kind is bool:
        return str(not field.default).lower(), "nonsense"
    if kind in (int, float):
        return str((field.default or 1) + 1), "many"
    assert kind in OPEN, f"say here what a {kind} looks like"
    return "somewhere", None


GOOD = {name: samples(name, field)[0] for name, field in FIELDS.items()}
BAD = {name: wrong for name, field in FIELDS.items() if (wrong := samples(name, field)[1]) is not None}


def variable_of(name: str) -> str:
    return PREFIX + name.upper()


def parse(*arguments: str) -> dict[str, str]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser)
    return vars(parser.parse_args(arguments))


def assert_only(settings: Settings, name: str) -> None:
    """The setting has its sample value, and every other one its default."""
    expected = Settings.model_validate({name: GOOD[name]})
    assert getattr(expected, name) != FIELDS[name].default
    assert settings == expected
    assert settings.model_dump(exclude={name}) == Settings().model_dump(exclude={name})


@pytest.mark.parametrize("name", FIELDS)
def test_an_option_sets_it(name: str) -> None:
    assert_only(load(parse(option_of(name), GOOD[name]), {}), name)


@pytest.mark.parametrize("name", FIELDS)
def test_a_variable_sets_it(name: str) -> None:
    assert_only(load({}, {variable_of(name): GOOD[name]}), name)


@pytest.mark.parametrize("name", FIELDS)
def test_the_option_wins_over_the_variable(name: str) -> None:
    other = BAD.get(name, "other")  # a variable that is overridden is not even read
    assert_only(load(parse(option_of(name), GOOD[name]), {variable_of(name): other}), name)


@pytest.mark.parametrize("name", FIELDS)
def test_the_default_holds_otherwise(name: str) -> None:
    assert getattr(load(parse(), {}), name) == FIELDS[name].default


@pytest.mark.parametrize("name", FIELDS)
def test_the_link_of_a_kubernetes_service_is_no_value(name: str, caplog: pytest.LogCaptureFixture) -> None:
    environment = {variable_of(name): "tcp://10.0.0.1:80", f"{variable_of(name)}_PORT_80_TCP": "tcp://10.0.0.1:80"}
    assert load({}, environment) == Settings()
    warn_of_unknown(environment)
    assert not caplog.records


@pytest.mark.parametrize("name", FIELDS)
def test_the_help_says_what_it_is_and_its_default(name: str) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    default = FIELDS[name].default
    value = "[VALUE]" if FIELDS[name].annotation is bool else "VALUE"
    said = f"{option_of(name)} {value} {FIELDS[name].description}"
    if default not in (None, ()):
        said += f" (default {default})"
    assert FIELDS[name].description
    assert said in " ".join(parser.format_help().split())


@pytest.mark.parametrize("name", BAD)
def test_a_bad_option_is_named_as_it_was_written(name: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load(parse(option_of(name), BAD[name]), {})
    assert str(refused.value).startswith(f"{option_of(name)}: ")
    assert repr(BAD[name]) in str(refused.value)
    assert variable_of(name) not in str(refused.value)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_variable_is_named_as_it_was_written(name: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load({}, {variable_of(name): BAD[name]})
    assert str(refused.value).startswith(f"{variable_of(name)}: ")
    assert repr(BAD[name]) in str(refused.value)
    assert option_of(name) not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "-1"),
        ("streams", "0"),
        ("streams", "33"),
        ("max_batch", "0"),
        ("max_queue", "0"),
        ("max_body_bytes", "0"),
        ("timeout_s", "0"),
        ("timeout_s", "nan"),
        ("timeout_s", "3601"),
        ("body_timeout_s", "0"),
        ("grace_s", "-1"),
        ("grace_s", "nan"),
        ("max_rate", "-1"),
        ("max_rate", "nan"),
        ("max_rate", "inf"),
        ("log_level", "INFO"),
    ],
)
def test_values_out_of_bounds(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=option_of(name)):
        load({name: value}, {})


def test_every_bad_value_is_told_at_once() -> None:
    with pytest.raises(SettingsError, match=r"HEATMAP_PORT: .*; .*--max-batch: "):
        load({"max_batch": "many"}, {"HEATMAP_PORT": "many"})


def test_an_unknown_variable_is_a_warning_that_names_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        environment = {"HEATMAP_MAX_BATCHES": "4", "HEATMAP_PORTS": "", "MAX_BATCH": "4", "PATH": "/bin"}
        assert load({}, environment) == Settings()
        warn_of_unknown({**environment, "HEATMAP_PORT": "1"})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("HEATMAP_MAX_BATCHES is not a setting and is ignored.")
    assert "'HEATMAP_MAX_BATCH'" in record.getMessage()


@pytest.mark.parametrize(
    "device", ["auto", "cpu", "cuda", "cuda:0", "cuda:1", "cuda:0,cuda:1", "cuda:10,cuda:2,cuda:3"]
)
def test_devices(device: str) -> None:
    assert load({"device": device}, {}).device == device


@pytest.mark.parametrize(
    "device", ["", "gpu", "CPU", "cpu,cuda", "cuda:", "cuda:x", "cuda:0,", "cuda:0 cuda:1", "cuda:-1"]
)
def test_wrong_devices(device: str) -> None:
    with pytest.raises(SettingsError, match="--device"):
        load({"device": device}, {})


@pytest.mark.parametrize("device", ["cuda,cuda:1", "cuda:\u0663"])
def test_wrong_devices_that_pass(device: str) -> None:
    with pytest.raises(SettingsError, match="--device"):
        load({"device": device}, {})


@pytest.mark.parametrize("given", ["--insecure", "--insecure=true", "--insecure --port=1", "--port=1 --insecure"])
def test_a_flag_needs_no_value(given: str) -> None:
    assert load(parse(*given.split()), {"HEATMAP_INSECURE": "false"}).insecure is True
    assert load(parse("--insecure", "false"), {"HEATMAP_INSECURE": "true"}).insecure is False


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost", "LocalHost"])
def test_this_machine_alone_is_served_without_more_words(host: str) -> None:
    check_exposure(Settings(host=host))


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "192.168.1.2", "128.0.0.1", "localhost.test", "fe80::1", "127.1"]
)
def test_another_address_needs_keys_or_the_word_insecure(host: str) -> None:
    with pytest.raises(SettingsError) as refused:
        check_exposure(Settings(host=host, insecure=False))
    said = str(refused.value)
    assert said.startswith(f"--host: others may reach {host!r}")
    assert all(
        way in said for way in ("--api-keys-file", "HEATMAP_API_KEYS_FILE", "--insecure", "HEATMAP_INSECURE=true")
    )
    check_exposure(Settings(host=host, insecure=True))
    check_exposure(Settings(host=host, api_keys_file=Path("keys")))


def test_an_empty_variable_is_none() -> None:
    assert load({}, {"HEATMAP_MODELS": "", "HEATMAP_PORT": ""}) == Settings()


def test_a_list_is_separated_by_commas() -> None:
    assert load({"cors_origins": " https://a.test , https://b.test,"}, {}).cors_origins == (
        "https://a.test",
        "https://b.test",
    )
    assert load({"cors_origins": ""}, {}).cors_origins == ()


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "https://app.example",
        "http://localhost:3000",
        "https://[::1]:8443",
        "https://xn--bcher-kva.test",
        "chrome-extension://abcdef",
    ],
)
def test_origins_as_browsers_send_them(origin: str) -> None:
    assert load({"cors_origins": origin}, {}).cors_origins == (origin,)


@pytest.mark.parametrize(
    "origin",
    [
        "https://app.example/",
        "app.example",
        "localhost:3000",
        "https://App.example",
        "https://app.example:443",
        "https://app.example/page",
        "https://user@app.example",
        "https://app.example?",
        "https://*.example",
        "https://",
        "https:app.example",
        "https://app.example:",
        "https://app.example:70000",
        "https://[",
        "file://",
        "null",
    ],
)
def test_an_origin_that_no_browser_sends_is_refused_by_its_name(origin: str) -> None:
    with pytest.raises(SettingsError, match=r"scheme://host\[:port\]") as refused:
        load({"cors_origins": f"https://good.test,{origin}"}, {})
    assert str(refused.value).startswith("--cors-origins: ")
    assert repr(origin) in str(refused.value)
    assert "good.test" not in str(refused.value)


@pytest.mark.parametrize(
    "host", ["maps", "Maps.Example.org", "my_service", "xn--bcher-kva.test", "a.test.", "10.0.0.1"]
)
def test_hosts_as_urls_name_them(host: str) -> None:
    assert load({"allowed_hosts": f"a.test, {host}"}, {}).allowed_hosts == ("a.test", host)


@pytest.mark.parametrize(
    "host", ["http://maps", "maps:8000", "maps/", "*", "*.maps", "a b", "-maps", ".maps", "bücher.test", "[::1]", "a@b"]
)
def test_a_host_that_no_request_names_is_refused(host: str) -> None:
    with pytest.raises(SettingsError, match="no scheme, no port") as refused:
        load({"allowed_hosts": f"a.test,{host}"}, {})
    assert str(refused.value).startswith("--allowed-hosts: ")
    assert repr(host) in str(refused.value)


def test_settings_never_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        setattr(Settings(), "port", 1)  # noqa: B010
    with pytest.raises(ValueError, match="Extra inputs"):
        Settings.model_validate({"prot": 1})
