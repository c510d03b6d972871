"""Errors that a user can mend. Their messages say how."""

from __future__ import annotations


class RequestError(ValueError):
    """Something was asked for that there is not."""


class BenchmarkError(Exception):
    """Something went wrong on the way: a process ended, a library is missing."""
