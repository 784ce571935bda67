"""The command line. `main` is the whole contract with the shell: exit status, and one line per error.

0 all is well · 1 the host refused something · 2 a bad request · 3 the guest crashed · 128+n ended by signal n · and
where a command was run in a guest, the command's own: 124 timed out, 125 the guest or its agent was lost, 126 not
executable, 127 not found.
"""

from __future__ import annotations

import os
import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the command that `arguments` (default: the process's own) name, then exit with its status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    own, words = _split(arguments)
    try:
        status = _run(own, words, debug="--debug" in own or bool(os.environ.get("OSTLER_DEBUG")))
    except KeyboardInterrupt:
        # Before the command had begun, or while its end was being told.
        status = 130
    sys.exit(status)


def _split(arguments: list[str]) -> tuple[list[str], tuple[str, ...] | None]:
    """Ostler's own arguments, and the guest's command behind `--`, where a "--debug" is not Ostler's."""
    if arguments[:1] in (["run"], ["exec"]) and "--" in arguments:
        at = arguments.index("--")
        return arguments[:at], tuple(arguments[at + 1 :])
    return arguments, None


def _run(arguments: list[str], words: tuple[str, ...] | None, *, debug: bool) -> int:
    from ostler.cli import short
    from ostler.errors import GuestCrash, OstlerError

    try:
        status = short.run(arguments) if words is None else short.run_image(arguments, words)
        if status is None:
            status = _long_way(arguments, words)
        sys.stdout.flush()
    except OstlerError as error:
        if debug and isinstance(error, GuestCrash):
            print(error.details, file=sys.stderr)  # noqa: T201
        elif debug:
            _print_traceback()
        return _complain(str(error), error.exit_status)
    except BrokenPipeError:
        # Whoever read standard output has gone; the interpreter must not meet that again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except Exception as error:
        if debug:
            _print_traceback()
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return _complain(f"internal error: {text} (a bug of Ostler's; --debug shows where)", 1)
    return status


def _long_way(arguments: list[str], words: tuple[str, ...] | None) -> int:
    """Understand the arguments with everything that takes, and do what they say."""
    import typer

    try:
        if arguments[:1] and arguments[0].partition("=")[0] == "--host":
            from ostler.cli import remote

            status = remote.run(arguments)
        else:
            from ostler.cli.app import app

            status = app(arguments, prog_name="ostler", standalone_mode=False, obj=words)
    except typer.TyperException as error:
        return _complain(error.format_message(), error.exit_code)
    except typer.Abort:
        return 130
    return status if isinstance(status, int) else 0


def _print_traceback() -> None:
    import traceback

    traceback.print_exc()


def _complain(message: str, status: int) -> int:
    # Rich's padding and line ends of a multi-line message would break the promise of one line.
    print("ostler: " + " ".join(message.split()), file=sys.stderr)  # noqa: T201
    return status
