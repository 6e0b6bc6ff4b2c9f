"""The command line `fastcam`: one command a pass, its arguments those of the pass's function.

`fastcam --help` imports neither torch nor any training library; a command imports what it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import inspect
import os
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastcam.errors import FastcamError

COMMANDS = {  # command: (module and function of the pass, what it does)
    "acdc": ("acdc", "slices of ACDC's heart scans in VOC's layout, with lists of labelled patients"),
    "demo": ("demo", "all of it on a small procedural data set, without downloads; ends in an HTML report"),
    "train": ("train", "train a method on image-level tags, or pre-train one on images alone"),
    "make-cam": ("make_cam", "multi-scale class activation maps of every image"),
    "refine": ("refine", "sharpen CAMs: by a CRF, regions, IRN, PSA, PAR or PAMR"),
    "mcof": ("mcof", "mine objects by regions and pixels in turn, from CAMs to a segmentation network"),
    "label": ("label", "turn CAMs into label PNGs, by one threshold or by two"),
    "pseudo-label": ("pseudo_label", "make-cam, refine and label in one go, on a folder or on millions of images"),
    "segment": ("segment", "train a segmentation network on label PNGs, or predict masks with one"),
    "few-shot": ("few_shot", "test a few-shot method on fixed episodes of novel classes"),
    "regions": ("regions", "regions without training: superpixels that grow together, as a tree to cut anywhere"),
    "evaluate": ("evaluate", "score labels or CAMs against masks"),
    "retrieve": ("retrieve", "find images like an image: descriptors, whitening, rankings, and their scores"),
    "probe": ("probe", "score the features of a frozen network by a linear classifier"),
    "convert": ("convert", "label PNGs, COCO's JSON, CAM stores and IRN's .npy files into each other"),
    "report": ("report", "one HTML file about a run: overlays, scores, times"),
    "bench": ("", "measure the kernels against what people use instead"),
    "env": ("env", "versions, devices, and the backends of every op with the reason where one cannot run"),
}
CONFIGS = Path(__file__).parent / "configs"
ERROR, INTERRUPTED = 2, 130  # exit status: bad input or settings; Ctrl-C, as shells count it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit status: 0; 2 for bad input or settings, after one line on standard error; 130 after Ctrl-C.
    """
    # Read when torch is loaded. Its threads spin while they wait for each other, by default so long that a training
    # step takes eight times as long where another process uses a core; not at all, and a demo step takes 1.4 times.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except FastcamError as error:
        message = str(error)
    except KeyboardInterrupt:
        message, status = "interrupted; run the same command again to continue", INTERRUPTED
        return _fail(message, status)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "fastcam":
            raise
        message = f"{error.name} is not installed; install it with: pip install 'fastcam[train]'"
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output, such as head, is gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        where = f"{error.filename}: " if error.filename else ""
        message = (
            f"{where}{error.strerror or error}; nothing more was written, run the command again when this is solved"
        )
    return _fail(message, ERROR)


def _run(argv: list[str]) -> int:
    about = "Image-level tags to segmentation masks, in passes that can be resumed."
    more = "Arguments of a command: fastcam COMMAND --help. Shipped configurations, by name for --config: "
    top = _Parser(prog="fastcam", description=about, epilog=f"{more}{', '.join(_shipped())}.")
    top.add_argument("--version", action="version", version=f"fastcam {_version()}")
    commands = top.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    args, _ = top.parse_known_args(argv[:1])
    rest = argv[1:]
    if args.command == "bench":
        return _bench(rest)
    module, summary = COMMANDS[args.command]
    file = importlib.import_module(f"fastcam.pipelines.{module}")
    function = getattr(file, module)
    result = function(**_arguments(args.command, function, summary, rest))
    if result is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        print(file.table(result) if hasattr(file, "table") else result)
    return 0


def _arguments(command: str, function: Any, summary: str, argv: list[str]) -> dict[str, Any]:
    """The arguments of a pass from its command line and YAML."""
    import jsonargparse

    about = inspect.cleandoc(function.__doc__ or summary).split("\nArgs:")[0].split("\nReturns:")[0].strip()
    parser = jsonargparse.ArgumentParser(
        prog=f"fastcam {command}", description=about, exit_on_error=False, allow_abbrev=False
    )
    help_text = (
        "YAML with any of the arguments below; a file, or the name of a shipped one. What follows it overrides it."
    )
    parser.add_argument("--config", action="config", help=help_text)
    known = parser.add_function_arguments(function, as_group=False, fail_untyped=True)
    try:
        config = parser.parse_args(_with_shipped(argv))
        values = parser.instantiate(config)
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise FastcamError(_explain(str(error), command, sorted(_keys(parser)))) from None
    return {key: values[key] for key in {name.split(".")[0] for name in known}}


def _explain(message: str, command: str, known: list[str]) -> str:
    """The parser's message in one line, with the nearest known key where a key is unknown."""
    line = " ".join(message.split())
    if unknown := re.search(
        r"(?:Group '(.+)' does not accept option|unrecognized arguments:|Option) '?(?:--)?([\w.-]+)", line
    ):
        key = ".".join(filter(None, unknown.groups()))
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"see fastcam {command} --help"
        return f"{command} has no argument '{key}'; {hint}"
    if wrong := re.search(r"Parser key \"([\w.-]+)\": Expected an? <class '(\w+)'>\. Got value: (.*)", line):
        kind = {"tuple": "list such as [1.0,0.5]", "int": "whole number", "float": "number"}.get(wrong[2], wrong[2])
        return f"argument {wrong[1]} is '{wrong[3]}', expected a {kind}"
    return f"{line}; see fastcam {command} --help"


def _keys(parser: Any) -> Iterator[str]:
    for action in parser._actions:
        for option in action.option_strings:
            if option.startswith("--"):
                yield option[2:].rstrip("+")


def _with_shipped(argv: list[str]) -> list[str]:
    """`--config NAME` as the path of the shipped file of that name, where no file NAME is there."""
    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        words += [flag, value] if flag == "--config" and equals else [word]
    for i, word in enumerate(words[1:], 1):
        if words[i - 1] == "--config" and not Path(word).is_file():
            shipped = CONFIGS / f"{Path(word).name.removesuffix('.yaml')}.yaml"
            if not shipped.is_file():
                near = difflib.get_close_matches(shipped.stem, _shipped(), n=1)
                hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(_shipped())}"
                raise FastcamError(f"config {word} is neither a file nor the name of a shipped configuration; {hint}")
            words[i] = str(shipped)
    return words


def _shipped() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def _bench(argv: list[str]) -> int:
    """`python -m fastcam.bench`."""
    before = sys.argv
    sys.argv = ["fastcam bench", *argv]
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, sys, "argv", before)
        runpy.run_module("fastcam.bench", run_name="__main__")
    return 0


def _version() -> str:
    from fastcam import __version__

    return __version__


def _fail(message: str, status: int) -> int:
    print("fastcam: error:", " ".join(message.split()), file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """Top level: its errors are ours, and a mistyped command names the nearest one."""

    def error(self, message: str) -> Any:
        wrong = re.search(r"invalid choice: '([^']*)'", message)
        if wrong:
            near = difflib.get_close_matches(wrong[1], COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}"
            raise FastcamError(f"there is no command '{wrong[1]}'; {hint}")
        raise FastcamError(f"{message}; see fastcam --help")
