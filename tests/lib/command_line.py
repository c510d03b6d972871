"""Runs a command of `cachedit` in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from cachedit_fx.cli import app

runner = CliRunner()


def invoke(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80", "TERM": "dumb"})


def plain(text):
    """Text without the boxes and line breaks that rich puts into messages."""
    return " ".join(text.replace("│", " ").split())
