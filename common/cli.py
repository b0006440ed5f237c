"""The `coterie` command: gathers the sub-commands that installed packages contribute, and prints errors as people
read them.

Results go to stdout; progress, logs and errors to stderr. With `--json` an error is the one JSON document on stdout.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import entry_points, version
from typing import Annotated, Any, NoReturn

import click
import typer
from typer.core import TyperGroup

from common.errors import CoterieError

GROUP = "coterie.commands"
INTERRUPTED, USAGE = 130, "usage"


class _Commands(TyperGroup):
    """Loads a sub-command only when it is used, so that `coterie --help` and errors are quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Names of all sub-commands, sorted."""
        return sorted(entry.name for entry in entry_points(group=GROUP))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The sub-command of that name, or None."""
        for entry in entry_points(group=GROUP, name=cmd_name):
            return _as_command(entry.load(), cmd_name)
        return None


def _as_command(loaded: Any, name: str) -> click.Command:
    """A click command from what an entry point names: a typer application or a plain function."""
    if isinstance(loaded, typer.Typer):
        group = typer.main.get_group(loaded)
        group.name = name
        return group
    app = typer.Typer(add_completion=False)
    app.command(name)(loaded)
    return typer.main.get_command(app)


app = typer.Typer(
    cls=_Commands,
    name="coterie",
    help="Privacy-first federated learning: organisations that cannot share data train one model together.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"coterie {version('coterie')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of `coterie` itself."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with the code that `common.errors` gives to what went wrong."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    _use_utf8()
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    try:
        code = app(words, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as e:
        e.show()
        sys.exit(e.exit_code)
    except click.ClickException as e:
        _print_error(USAGE, e.format_message(), "`--help` after the command lists its options", e.exit_code, as_json)
    except CoterieError as e:
        _print_error(e.code, str(e), e.hint, e.exit_code, as_json)
    except (KeyboardInterrupt, click.Abort):
        _print_error("interrupted", "interrupted", "", INTERRUPTED, as_json)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone
        sys.exit(INTERRUPTED)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _print_error(code: str, message: str, hint: str, exit_code: int, as_json: bool) -> NoReturn:
    if as_json:
        document = {"code": code, "message": message, "hint": hint, "exit_code": exit_code}
        typer.echo(json.dumps({"error": document}))
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(message, err=True)
    if hint:
        typer.secho("hint: ", fg="cyan", bold=True, nl=False, err=True)
        typer.echo(hint, err=True)
    sys.exit(exit_code)


def _use_utf8() -> None:
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    main()
