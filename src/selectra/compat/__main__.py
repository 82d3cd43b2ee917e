"""`python -m selectra.compat run SCRIPT ARGS...`: run somebody's script as it is, on our kernels."""

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from selectra.compat import install

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.callback()
def main() -> None:
    """Run the field's own repositories without their CUDA builds."""


@app.command(context_settings=PASSED_ON)
def run(
    context: typer.Context,
    script: Annotated[str, typer.Argument(help="A Python file; everything after it is the script's.")],
) -> None:
    """Run a Python script with mamba_ssm, causal_conv1d and the compiled scan modules made importable."""
    path = Path(script)
    if not path.is_file():
        typer.echo(f"there is no file '{script}'", err=True)
        raise typer.Exit(2)
    sys.argv = [script, *context.args]
    # As Python does for a script: its own folder comes first. Packages that stand there count as installed.
    sys.path[0] = str(path.resolve().parent)
    install()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    app()
