"""Runs a command of `cachedit` in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from cachedit_fx.cli import app

runner = CliRunner()


def invoke(*arguments, columns=80):
    environment = {"COLUMNS": str(columns), "TERM": "dumb"}
    return runner.invoke(app, [str(argument) for argument in arguments], env=environment)


def plain(text):
    """Text without the boxes and line breaks that rich puts into messages."""
    return " ".join(text.replace("│", " ").split())
