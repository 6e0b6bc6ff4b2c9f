"""The book-keeping of an output folder: which configuration filled it, and what is finished."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastcam.errors import FastcamError
from fastcam.io.atomic import atomic_write

_OUTPUTS = {".npz", ".npy", ".png", ".safetensors", ".ckpt"}


def open_pass(out: str | os.PathLike[str], config: Mapping[str, Any]) -> str:
    """Opens the output folder of a pass, new or begun, for one configuration.

    The first call writes `pass.json`; later calls compare with it. Several processes may open the same folder at once.

    Args:
        out: the folder; made if it is missing.
        config: all that the output depends on, as plain values. Put the fingerprint of the pass before in it, and a
            change there is noticed here.

    Returns:
        The fingerprint: the SHA-256 of the configuration as JSON.

    Raises:
        TypeError: `config` holds something JSON cannot.
        FastcamError: the folder holds output of another configuration (the changed keys are named), or output without
            a `pass.json`.
    """
    out = Path(out)
    text = json.dumps(config, sort_keys=True, default=_path)
    wanted = json.loads(text)
    record = read_pass(out)
    if record is None:
        if out.exists() and not out.is_dir():
            raise FastcamError(f"output folder {out} is a file; choose another one")
        if out.is_dir() and (stray := next((path for path in sorted(out.iterdir()) if _is_output(path)), None)):
            raise FastcamError(
                f"output folder {out} holds {stray.name} but no pass.json, so its origin is unknown; "
                "choose an empty folder"
            )
        record = {"config": wanted, "fingerprint": hashlib.sha256(text.encode()).hexdigest()}
        with atomic_write(out / "pass.json") as temporary:
            temporary.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    elif record["config"] != wanted:
        changes = ", ".join(_changes(record["config"], wanted))
        raise FastcamError(
            f"output folder {out} was made with another configuration ({changes}); choose another folder or remove it"
        )
    return record["fingerprint"]


def read_pass(out: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record of a pass folder: `{"config", "fingerprint"}`, or `None` where no pass was begun.

    Raises:
        FastcamError: `pass.json` is damaged.
    """
    path = Path(out) / "pass.json"
    try:
        record = json.loads(path.read_text())
        return {"config": dict(record["config"]), "fingerprint": str(record["fingerprint"])}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FastcamError(
            f"{path} does not read as the record of a pass ({error!r}); choose another folder or remove it"
        ) from error


def finished_ids(out: str | os.PathLike[str], suffix: str) -> set[str]:
    """The ids whose file `<id><suffix>` exists below `out`; an id may contain slashes.

    Hidden (unfinished) files do not count.

    Cost: one listing of every folder below `out`.
    """
    out = Path(out)
    ids = set()
    for folder, _, names in os.walk(out):
        prefix = Path(folder).relative_to(out)
        ids |= {
            (prefix / name.removesuffix(suffix)).as_posix()
            for name in names
            if name.endswith(suffix) and name[0] != "."
        }
    return ids


def _is_output(path: Path) -> bool:
    return path.suffix in _OUTPUTS and path.name[0] != "."


def _path(value: object) -> str:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"open_pass: expected plain values in config, got {value!r}")


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`{"crf": {"srgb": 5}}` and `{"crf": {"srgb": 13}}` give `crf.srgb: 5 -> 13`."""
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, "unset"), new.get(key, "unset")
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _changes(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}: {' -> '.join('set' if isinstance(v, dict) else str(v) for v in (before, after))}"
