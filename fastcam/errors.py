"""The one exception for bad input files and settings."""

from importlib import import_module
from types import ModuleType


class FastcamError(Exception):
    """A file or a setting that fastcam cannot use.

    The message is one line: the thing, what came, what was expected, what to do. The command line prints it and exits
    with status 2.
    """


def optional_module(name: str, what: str, extra: str) -> ModuleType:
    """Imports a library that only some uses need.

    Args:
        name: of the module.
        what: needs it, for the message.
        extra: of this package, which installs it.

    Raises:
        FastcamError: it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != name.split(".")[0]:
            raise
        package = name.split(".")[0]
        raise FastcamError(
            f"{what} needs {package}, which is not installed; install it with: pip install 'fastcam[{extra}]'"
        ) from None
