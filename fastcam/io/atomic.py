"""Files that are either whole or absent."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastcam.errors import FastcamError


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path in the folder of `path`; the file written there takes the name `path` at the end.

    Whoever looks sees the old file or the new one, also when the process is killed in between: then a hidden `.tmp-*`
    file may be left, which no reader of an output folder looks at. Missing parent folders are made. The file is not
    synced to the device, so a power cut may still lose it.

    Args:
        path: the final file. The temporary one has the same suffix, from which some writers choose their format.

    Raises:
        FastcamError: the operating system refused to write (full disk, no permission, ...). Nothing half-written is
            left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise FastcamError(f"{path} could not be written: {reason}; free space or choose another folder") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
