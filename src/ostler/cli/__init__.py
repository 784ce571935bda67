"""The command line: `ostler`."""

from __future__ import annotations

from ostler import __version__


def main() -> None:
    """Entry point of the `ostler` command."""
    import typer

    app = typer.Typer(name="ostler", no_args_is_help=True)

    @app.command()
    def version() -> None:
        """Print the version."""
        typer.echo(__version__)

    app()
