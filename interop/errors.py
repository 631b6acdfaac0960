"""The one exception that reading and writing files of others raises."""

from __future__ import annotations


class FormatError(ValueError):
    """A file, directory or setting that can't be used as it is: broken, hostile, or of a kind that isn't supported.

    The message names the file or adapter, the tensor or field, what was expected, what was found, and what to do.
    """
