"""Errors of the composition: a study file, a site's own files, its data, a run's output. Each is a `SecAggError`."""

from __future__ import annotations

from secagg.errors import RemoteProtocolError, SecAggError


class StudyError(SecAggError):
    """A study, an agreement or its file asks for something that cannot be; the message holds the path in the file."""


class DataError(SecAggError):
    """A site's data cannot be used; the message names the site, the column and the value."""


class OutputError(SecAggError):
    """A run could not be written; the message says where it was kept instead, if anywhere."""


class PolicyRefusal(RemoteProtocolError):
    """The server asks for less than a site's policy; the message says what the policy asks for."""


class StateError(SecAggError):
    """A site's state on disk is old, damaged, in use or could not be saved; the message says what to do."""


class SiteFileError(SecAggError):
    """A site's own file says what cannot be; the message holds the file and the path in it."""


class KeyFileError(SecAggError):
    """A key, a passphrase or a roster cannot be read or written, or is not what it says; the message names the file."""


class ServiceError(SecAggError):
    """A site's own process cannot be reached or could not answer; the message names the socket."""


class LinkError(SecAggError):
    """What carries messages between machines cannot be used; the message says what to start or to change."""
