"""The command line: `serve` models over HTTP, `explain` pictures without it, print `openapi`, make an API `key`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from service import __version__, logs
from service.errors import ModelLoadError, ServiceError
from service.keys import make_key
from service.settings import Settings, SettingsError, add_options, check_exposure, load, warn_of_unknown


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
    parser = argparse.ArgumentParser(prog="heatmap-service", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve models over HTTP", formatter_class=_Help, allow_abbrev=False)
    add_options(serve)
    explain = commands.add_parser("explain", help="write heatmaps of pictures without a server")
    explain.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    explain.add_argument("-m", "--method", default="grad_cam", help="heatmap method (default grad_cam)")
    explain.add_argument(
        "-o", "--out", required=True, type=Path, help="file for one picture (.png, .webp, .jpg or .npy), else a folder"
    )
    explain.add_argument("--models", type=Path, help="folder with one folder per model")
    explain.add_argument("--model", help="id of the model (default: the only one)")
    commands.add_parser("openapi", help="print the OpenAPI document")
    key = commands.add_parser("key", help="make an API key and its line for the file of --api-keys-file")
    key.add_argument("name", metavar="NAME", help="who it is for; logs name it")
    key.add_argument("--rights", default="predict", help="predict (default), admin or predict,admin")
    return parser


class _Help(argparse.HelpFormatter):
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


def _explain(pictures: list[Path], method: str, out: Path, models: Path | None, model: str | None) -> None:
    from service.workers.local import explain  # torch comes in here, and only in this command

    for line in explain(pictures, method, out, models, model):
        print(line)


def _key(name: str, rights: str) -> None:
    key, line = make_key(name, rights)
    print(f"key:  {key}\nline: {line}")
    print("The key is for the client and is shown this once; the line is for the file of keys.", file=sys.stderr)


def _openapi() -> None:
    from service.app import create_app

    print(json.dumps(create_app(Settings()).openapi(), indent=2))


if __name__ == "__main__":
    main()
