"""The one exception for bad input files and settings."""


class FastcamError(Exception):
    """A file or a setting that fastcam cannot use.

    The message is one line: the thing, what came, what was expected, what to do. The command line prints it and exits
    with status 2.
    """
