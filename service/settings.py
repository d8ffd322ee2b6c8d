"""Every setting of the server in one frozen object: an option of `serve` and a variable `HEATMAP_<NAME>` each."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, Url

from service.errors import nearest
from service.logs import Format

PREFIX = "HEATMAP_"
MIB = 2**20
HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?\.?")

logger = logging.getLogger(__name__)


class SettingsError(Exception):
    """A setting has a bad value; the message names the setting as the user wrote it."""


def _comma_list(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _origin(entry: str) -> str:
    """An entry that a browser's header may equal; any other would be listed in vain."""
    if entry not in ("*", _as_sent(entry)):
        raise PydanticCustomError(
            "origin",
            "an origin is * or scheme://host[:port] as browsers send it: small letters, no path, no default port",
        )
    return entry


def _as_sent(entry: str) -> str | None:
    try:
        url = Url(entry)
        if not url.host or "*" in url.host:
            return None
        return str(Url.build(scheme=url.scheme, host=url.host, port=url.port)).removesuffix("/")
    except ValueError:  # it is no URL
        return None


def _host(entry: str) -> str:
    """An entry that the Host header may name; any other would be listed in vain."""
    if not HOST.fullmatch(entry):
        raise PydanticCustomError(
            "host", "a host is a name as in a URL, such as maps.example.org: no scheme, no port, no path, no *"
        )
    return entry


class Settings(BaseModel):
    """All settings with their defaults. A field's description is the help text of its option."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: Path | None = Field(
        None, description="folder with one folder per model; without it the embedded default model is served"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda|cuda:[0-9]+(,cuda:[0-9]+)*)$",
        description="auto, cpu, cuda (all of them), or a list such as cuda:0,cuda:1; one worker process each",
    )
    streams: int | None = Field(
        None, ge=1, le=32, description="streams per CUDA device, slots on a CPU; default 2 and 1"
    )
    max_batch: int = Field(8, ge=1, le=1024, description="pictures in one pass through a network")
    compiled_heads: int = Field(
        8, ge=0, description="compiled heads that stay resident on each device; 0 computes eagerly alone"
    )
    cache: Path = Field(Path("~/.cache/heatmap-service"), description="folder in which compiled heads are kept")
    cache_bytes: int = Field(4096 * MIB, ge=0, description="bytes of the compiled heads in the cache folder")
    activation_cache: int = Field(
        256 * MIB,
        ge=0,
        description="bytes of activations kept on each device for pictures that come again; 0 keeps none",
    )
    max_queue: int = Field(256, ge=1, description="requests that may be accepted and unanswered")
    max_queue_pictures: int = Field(1024, ge=1, description="pictures of all accepted, unanswered requests")
    max_queue_bytes: int = Field(
        512 * MIB, ge=1, description="bytes of all accepted, unanswered requests; and of all bodies that arrive"
    )
    max_connections: int = Field(
        800, ge=1, description="open connections; a few more are accepted to answer probes, and get 503 for all else"
    )
    max_unread_bytes: int = Field(
        256 * MIB,
        ge=1,
        description="bytes of all answers being sent, in memory or in files; above it work is refused",
    )
    max_header_bytes: int = Field(64 * 1024, ge=1024, description="bytes of one request's line and headers")
    max_body_bytes: int = Field(32 * MIB, ge=1, description="bytes of one request's body")
    max_pictures: int = Field(64, ge=1, description="pictures of one request")
    max_parts: int = Field(128, ge=1, description="parts of one form: pictures and fields")
    max_pixels: int = Field(50_000_000, ge=1, description="pixels of one picture, read from its header")
    max_decode_s: float = Field(
        5.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds of one core that decoding a picture may take, estimated from its header",
    )
    max_request_pixels: int = Field(
        200_000_000, ge=1, description="pixels of all pictures of one request; they are in memory together"
    )
    max_heatmap_pixels: int = Field(
        100_000_000,
        ge=1,
        description="pixels of all heatmaps of one request; each counts at least as the network's input",
    )
    max_rate: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="requests for work per second and key, or address where there is no key; 0 sets no limit",
    )
    timeout_s: float = Field(30.0, gt=0, le=3600, description="deadline of a request that names none, in seconds")
    body_timeout_s: float = Field(
        30.0,
        gt=0,
        description="seconds within which the headers, and then the body, must come, and 128 KiB of an answer be read",
    )
    grace_s: float = Field(30.0, ge=0, description="seconds that accepted requests get after SIGTERM")
    hang_s: float = Field(
        60.0, ge=2, description="seconds without progress after which a worker is killed and replaced"
    )
    load_timeout_s: float = Field(
        300.0, gt=0, description="seconds within which a model must load; one that takes longer is given up"
    )
    api_keys_file: Path | None = Field(
        None, description="file with a line per key, from `heatmap-service key`; without it everybody may predict"
    )
    insecure: bool = Field(
        False, description="serve without keys on an address that others reach; something else must keep them out"
    )
    allowed_hosts: Annotated[tuple[Annotated[str, AfterValidator(_host)], ...], BeforeValidator(_comma_list)] = Field(
        (),
        description="names, separated by commas, that the server answers to beside localhost, --host and IP addresses",
    )
    cors_origins: Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], BeforeValidator(_comma_list)] = Field(
        (), description="origins, separated by commas, whose pages may call the service"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Format = Field("text", description="text for people, or json: an object on each line")


def option_of(name: str) -> str:
    """The command line's spelling of a setting."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add one option per setting; an option that is not given leaves the environment and the default alone."""
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, ()) else f" (default {field.default})"
        flag: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}  # needs no value
        parser.add_argument(
            option_of(name), default=argparse.SUPPRESS, metavar="VALUE", help=f"{field.description}{default}", **flag
        )


def check_exposure(settings: Settings) -> None:
    """Raise SettingsError where others could reach the server without a key, and nobody said that they may."""
    if settings.api_keys_file or settings.insecure or _is_loopback(settings.host):
        return
    raise SettingsError(
        f"{option_of('host')}: others may reach {settings.host!r}, and nobody would need a key; either name a file "
        f"with --api-keys-file (HEATMAP_API_KEYS_FILE; `heatmap-service key NAME` makes a key), or say --insecure "
        f"(HEATMAP_INSECURE=true) where something else keeps them out"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def load(options: Mapping[str, str], environment: Mapping[str, str]) -> Settings:
    """Settings from the command line's options, else the environment, else the defaults.

    Raises SettingsError for a bad value. Values that start with `tcp://` are what Kubernetes sets for a service of the
    same name, and are ignored.
    """
    values: dict[str, str] = {}
    sources: dict[str, str] = {}
    for variable, value in _given(environment):
        name = variable.removeprefix(PREFIX).lower()
        if name in Settings.model_fields:
            values[name], sources[name] = value, variable
    for name in options:
        values[name], sources[name] = options[name], option_of(name)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problems = (
            f"{sources[str(problem['loc'][0])]}: {problem['msg']}, got {problem['input']!r}"
            for problem in error.errors()
        )
        raise SettingsError("; ".join(problems)) from None


def warn_of_unknown(environment: Mapping[str, str]) -> None:
    """Log each `HEATMAP_*` variable that is no setting, with the nearest names; for when it is known how to log."""
    known = [PREFIX + field.upper() for field in Settings.model_fields]
    for variable, _ in _given(environment):
        if variable.upper() not in known:
            logger.warning("%s is not a setting and is ignored.%s", variable, nearest(variable, known))


def _given(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Our variables that have a value."""
    for variable, value in environment.items():
        if variable.startswith(PREFIX) and value and not value.startswith("tcp://"):
            yield variable, value
