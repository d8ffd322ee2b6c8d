"""The command line: `serve` models over HTTP, `explain` pictures without it, print `openapi`, make an API `key`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from service import __version__, logs
from service.errors import ModelLoadError, ServiceError
from service.keys import make_key
from service.settings import Settings, SettingsError, add_options, check_exposure, load, option_of, warn_of_unknown

OUT = "folder, or the file of a single heatmap, whose ending says the format: .png, .webp, .jpg, .npy"
FIELDS: dict[str, tuple[list[str], str, str]] = {
    "method": (["-m"], "NAME", "heatmap method; say it again for more (default grad_cam)"),
    "target_classes": (["-c"], "CLASS", "id or name of a class; say it again for more (default: the most confident)"),
    "gen_params": (["-p"], "JSON", "parameters of the methods, an object (default {})"),
    "format": (["-f"], "FORMAT", "overlay, heatmap, gray, gray16 or npy (default overlay)"),
    "encoding": ([], "ENCODING", "png, webp or jpeg, of overlay and heatmap (default png)"),
    "size": ([], "SIZE", "original: the picture's own pixels; model: the network's input (default original)"),
    "colormap": ([], "NAME", "colours of overlay and heatmap (default jet)"),
    "alpha": ([], "SHARE", "how much the colours cover the picture, from 0 to 1 (default 0.5)"),
}
"""Options of `explain` that are fields of `POST /models/{id}/heatmap`: flags, value, help."""
VARIABLES = "Each option is also a variable of the environment, HEATMAP_<NAME>."
EXAMPLES = """\
examples:
  heatmap-service explain cat.jpg -o heatmap.png
  heatmap-service explain photos -o maps -m grad_cam -m saliency -c tabby -c 282
  heatmap-service explain cat.jpg -o maps -p '{"target_conv_layer": "recommended"}' --colormap viridis

The files in the folder are named PICTURE-METHOD-CLASS. Where a picture fails, the error says why, the others are done,
and the exit status is 1. Methods, their parameters and colour maps are those of the server."""


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a wrong setting or request ends it with a message and status 2, another error with 1."""
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    try:
        if command == "serve":
            _serve(load(options, os.environ))
            return
        logs.configure("info", "text", "command")
        if command == "explain":
            _explain(**options)
        elif command == "key":
            _key(**options)
        else:
            _openapi()
    except SettingsError as error:
        print(f"heatmap-service: {error}", file=sys.stderr)
        sys.exit(2)
    except (ServiceError, ModelLoadError, OSError) as error:
        sys.exit(f"heatmap-service: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="heatmap-service", description="Show what an image model saw: classes with confidences, and heatmaps."
    )
    parser.add_argument("--version", action="version", version=f"heatmap-service {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_options(commands.add_parser("serve", **_texts("serve models over HTTP", VARIABLES)))
    explain = commands.add_parser("explain", **_texts("write heatmaps of pictures without a server", EXAMPLES))
    explain.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE", help="picture, or folder with pictures")
    explain.add_argument("-o", "--out", required=True, type=Path, metavar="OUT", help=OUT)
    for name, (flags, value, said) in FIELDS.items():
        explain.add_argument(*flags, option_of(name), action="append", default=[], metavar=value, help=said)
    explain.add_argument("--models", type=Path, metavar="DIR", help="folder with one folder per model")
    explain.add_argument("--model", metavar="ID", help="id of the model (default: the only one)")
    commands.add_parser("openapi", **_texts("print the OpenAPI document"))
    key = commands.add_parser("key", **_texts("make an API key and its line for the file of --api-keys-file"))
    key.add_argument("name", metavar="NAME", help="who it is for; logs name it")
    key.add_argument("--rights", default="predict", help="predict (default), admin or predict,admin")
    return parser


def _texts(does: str, more: str | None = None) -> dict[str, Any]:
    """How a command is described: in a line of the list of commands, and in its own help with `more` below."""
    description = f"{does[0].upper()}{does[1:]}."
    return {
        "help": does,
        "description": description,
        "epilog": more,
        "formatter_class": _Help,
        "allow_abbrev": False,
    }


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


def _serve(settings: Settings) -> None:
    from service.app import Server, create_app, return_freed_memory
    from service.workers.devices import resolve

    logs.configure(settings.log_level, settings.log_format)
    warn_of_unknown(os.environ)
    check_exposure(settings)
    resolve(settings.device)  # a device that is not there stops the start here, with a message
    return_freed_memory()
    Server(create_app(settings), settings).run()


def _explain(pictures: list[Path], out: Path, models: Path | None, model: str | None, **fields: list[str]) -> None:
    from tqdm import tqdm

    from service.api.files import find_pictures, read_request

    files = find_pictures(pictures)
    texts = [(name, text) for name, given in fields.items() for text in given]
    request, ending = read_request(texts, out, len(files))
    from service.workers.local import explain  # torch comes in here, and only in this command

    failed = 0
    outcomes = explain(request, files, out, ending, models, model)
    for picture, outcome in tqdm(outcomes, total=len(files), unit="picture", disable=None):
        if isinstance(outcome, Exception):
            failed += 1
            tqdm.write(f"heatmap-service: {picture}: {outcome}", sys.stderr)
        else:
            tqdm.write("\n".join(outcome))
    if failed:
        sys.exit(f"heatmap-service: {failed} of {len(files)} pictures failed")


def _key(name: str, rights: str) -> None:
    key, line = make_key(name, rights)
    print(f"key:  {key}\nline: {line}")
    print("The key is for the client and is shown this once; the line is for the file of keys.", file=sys.stderr)


def _openapi() -> None:
    from service.app import create_app

    print(json.dumps(create_app(Settings()).openapi(), indent=2))


if __name__ == "__main__":
    main()
