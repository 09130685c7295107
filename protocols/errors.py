"""Errors of the composition: a study file, a site's data, a run's output. Each is a `SecAggError`."""

from __future__ import annotations

from secagg.errors import SecAggError


class StudyError(SecAggError):
    """A study or its file asks for something that cannot be; the message holds the path in the file."""


class DataError(SecAggError):
    """A site's data cannot be used; the message names the site, the column and the value."""


class OutputError(SecAggError):
    """A run could not be written; the message says where it was kept instead, if anywhere."""
