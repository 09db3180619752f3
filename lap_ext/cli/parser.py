# SPDX-License-Identifier: MIT
"""The subcommands and options of lap-ext, without torch; shtab writes the completion scripts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import lap_ext
from lap_ext._files import parsed_size
from lap_ext._text import did_you_mean, visible
from lap_ext.errors import LapImportError

_MODEL = """\
MODEL is one of
  a checkpoint directory   of Hugging Face: config.json and safetensors files,
                           sharded or not. It is streamed, so it may be larger
                           than memory.
  package.module:factory   your function, which returns a module, or (module,
                           example_inputs). The weights are those of
                           --checkpoint, or those that the function sets.
Nothing is downloaded. For a model of the Hugging Face Hub:
  hf download meta-llama/Llama-3.2-1B --local-dir ./llama
Pickle files (.pt, .pth, .bin) and torch.export programs (.pt2) are rejected:
loading one can execute any code. If you trust it, load it in a factory.
"""
_EXAMPLES = """\
examples:
  lap-ext prune ./llama -s 0.5 -o ./llama-50 --report llama-50.html
  lap-ext prune my.nets:resnet --checkpoint resnet.safetensors --sparsity 0.9 \\
      --scope global --out ./resnet-90
  lap-ext prune ./bert --sparsity 'encoder.*=0.8' --sparsity 'pooler*=0.5' \\
      --out ./bert-pruned
  lap-ext prune ./llama --structure 2:4 --out ./llama-24
  lap-ext verify ./llama-50 ./llama
"""
_MORE = """\
  lap-ext help SUBCOMMAND                 the options of a subcommand
  eval "$(lap-ext --completion bash)"     completion in this shell

exit status:
  0 success; 1 verify has findings; 2 a usage error or an unusable file, as one
  line; 130 stopped with Ctrl-C. No output is left half-written, and the
  original is never modified.
"""
_SCORE = """\
The table shows for each layer how many scores are zero (in a dead channel); the
smallest score, the median, the largest, and the 10th and 90th percentiles; and
the squared norm, the sum of the squared scores.

example:
  lap-ext score ./llama --out llama-scores.safetensors
"""
_VERIFY = """\
Every kept weight must have the bits of the original, every pruned weight must
be zero, and the number of kept weights must match the sparsity. The exit status
is 1 if any of this does not hold.

example:
  lap-ext verify ./llama-50 ./llama
"""
_REPORT = """\
RESULT is the directory that lap-ext prune wrote, or a file with what prune
printed with --json. Kept mass and distributions are measured on the weights of
the original, which is only read.

examples:
  lap-ext report ./llama-50
  lap-ext report ./llama-50 ./llama -o page.html
"""
_BENCH = """\
Times lap_ext.mask against baselines: the scores in eager PyTorch, then topk,
kthvalue or a stable sort. Results are compared first. Calls are timed in pairs,
side by side; the ratio is the median over the pairs of (the baseline's time /
lap_ext's time). Where the quartiles include 1, neither is measurably faster.
The weights are random and have the shapes of MODEL's layers.

examples:
  lap-ext bench
  lap-ext bench ./llama --sparsity 0.5
"""
_CRITERIA = ("lookahead", "lookforward", "lookback", "magnitude", "magnitude_bn", "random")
WITH_DATA = ("lookahead_act", "minitron", "obd", "obd_lookahead", "reap", "wanda",
             "weight_gradient")  # fmt: skip
BY_UNIT = ("minitron", "reap")  # no scores of weights
_ELSEWHERE = {"model": "a factory (package.module:factory)", "example_inputs": "--input"}
_QUOTES = "'\""
_SHELLS = ("bash", "zsh", "fish", "tcsh")
TARGETS = ("params", "flops")  # options in place of --sparsity


class _Parser(argparse.ArgumentParser):
    """Reports a usage error in one line, with what may have been meant."""

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith(("?", ".")) else "."
        self.exit(2, f"{self.prog}: {visible(message)}{end} See {self.prog} --help.\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Checks a choice, which argparse would report without a suggestion."""
        if action.choices is None or value in action.choices:
            return
        names = list(map(str, action.choices))
        hint = did_you_mean(str(value), names, cutoff=0.5)
        text = f"expected one of {', '.join(names)}, got {value!r}. {hint}".rstrip()
        raise argparse.ArgumentError(action, text)

    def check_names(self, argv: Sequence[str]) -> None:
        """Raises for an option that is none, which argparse would report after all others."""
        known = list(self._option_string_actions)
        for argument in argv:
            name = argument.partition("=")[0]
            if name == "--":
                return
            if name.startswith("--") and not any(x.startswith(name) for x in known):
                self.error(f"no option {name}. {did_you_mean(name, known)}".rstrip())


class _Completion(argparse.Action):
    """Prints a completion script and exits."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        _namespace: object,
        shell: Any,
        _option: object = None,
    ) -> None:
        try:
            script = completion(shell)
        except ModuleNotFoundError as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
        sys.stdout.write(script)
        parser.exit()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments; SystemExit after --help, --version, --completion or a usage error."""
    given, parser = list(sys.argv[1:] if argv is None else argv), build()
    commands = _subparsers(parser)
    if given and given[0] in commands:
        commands[given[0]].check_names(given[1:])
    options = parser.parse_args(given or ["help"])
    if options.subcommand == "help":
        (commands[options.about] if options.about else parser).print_help()
        parser.exit()
    return options


def build() -> argparse.ArgumentParser:
    """Builds the parser of all subcommands."""
    raw: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = _Parser(
        prog="lap-ext",
        description="Lookahead pruning of models and checkpoints.",
        epilog=f"{_EXAMPLES}{_MORE}",
        **raw,
    )
    version = f"lap_ext {lap_ext.__version__}"
    parser.add_argument("-V", "--version", action="version", version=version)
    parser.add_argument(
        "--completion",
        action=_Completion,
        choices=_SHELLS,
        metavar="SHELL",
        help=f"print a completion script: {', '.join(_SHELLS)}",
    )
    subparsers = parser.add_subparsers(
        title="subcommands", dest="subcommand", metavar="SUBCOMMAND", required=True
    )
    for name, (text, add_options, epilog) in _SUBCOMMANDS.items():
        about = f"{text[0].upper()}{text[1:]}."
        command = subparsers.add_parser(name, help=text, description=about, epilog=epilog, **raw)
        add_options(command)
        add = command.add_argument
        add("--json", action="store_true", help="print the result as JSON")
        add("--quiet", action="store_true", help="print one line, and no progress")
        add("--debug", action="store_true", help="show the traceback of an error")
    text = "show the options of a subcommand"
    command = subparsers.add_parser("help", help=text, description=f"{text.capitalize()}.")
    choices = list(_SUBCOMMANDS)
    command.add_argument("about", nargs="?", choices=choices, metavar="SUBCOMMAND", help="its name")
    return parser


def spellings(subcommand: str) -> dict[str, str]:
    """Maps the arguments of a subcommand to how they are written on its command line.

    Example:
        >>> names = spellings("prune")
        >>> names["batch_norm"], names["memory"], names["model"]
        ('--batch-norm', '--memory', 'MODEL')
    """
    actions = _subparsers(build())[subcommand]._actions
    return {x.dest: x.option_strings[-1] if x.option_strings else str(x.metavar) for x in actions}


def options(subcommand: str) -> Callable[[str, str], str]:
    """Makes the function that spells an option of the library for a subcommand.

    Example:
        >>> spelled = options("prune")
        >>> spelled("on_unsupported", "'cut'"), spelled("model", "")
        ('--on-unsupported cut', 'a factory (package.module:factory)')
        >>> spelled("strict", "True")
        '--strict'
        >>> spelled("neighbors", "{...}")
        'neighbors={...} in Python'
    """
    names = spellings(subcommand) | _ELSEWHERE

    def spelled(name: str, value: str) -> str:
        if name not in names:
            return f"{name}={value} in Python"
        shown = "" if value == "True" else value.strip(_QUOTES)  # a flag takes no value
        return f"{names[name]} {shown}".rstrip()

    return spelled


def _add_model(command: argparse.ArgumentParser, required: bool = True) -> None:
    add = command.add_argument
    # fmt: off
    add("model", nargs=None if required else "?", metavar="MODEL",
        help="a checkpoint directory or package.module:factory, see below")
    add("--checkpoint", type=Path, metavar="FILE",
        help="safetensors file with the weights of a factory's model")
    add("--input", action="append", default=[], metavar="SHAPE",
        help="an example input, such as 1x3x224x224 or 1x16:int64, or with its name "
        "pixel_values=1x3x224x224, if MODEL has none; may be repeated")
    _add_choice(command, "--on-unsupported", ("raise", "cut"),
                "at an operation that the trace does not support, raise an error or cut the graph")
    # fmt: on


def _add_choice(
    command: argparse.ArgumentParser, name: str, choices: Sequence[str], text: str
) -> None:
    """Adds an option whose first choice is the default."""
    shown = f"{text}: {', '.join(choices)} (default: {choices[0]})"
    metavar = name.removeprefix("--").upper()
    command.add_argument(name, choices=choices, default=choices[0], metavar=metavar, help=shown)


def _add_scoring(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    # fmt: off
    _add_choice(command, "--criterion", (*_CRITERIA, *WITH_DATA),
                f"what scores a weight; {', '.join(WITH_DATA)} need --statistics")
    add("--statistics", dest="data", type=Path, metavar="FILE",
        help="safetensors file of what a criterion needs of data, saved from the result of "
        "lap_ext.criteria.measure in Python")
    _add_choice(command, "--normalize", ("auto", "none", "norm", "lamp"),
                "how scores are made comparable between layers; auto is lamp for --scope global")
    add("--layers", action="append", metavar="PATTERN",
        help="names of the layers to use, such as 'encoder.*', or '*'; may be repeated "
        "(default: all but embeddings and output heads)")
    add("--exclude", action="append", default=[], metavar="PATTERN",
        help="names of layers to leave out, such as 'lm_*'; may be repeated")
    _add_choice(command, "--batch-norm", ("edge", "fold", "ignore"),
                "count batch norms as scales of edges, fold them into weights too, or ignore them")
    add("--memory", type=memory, metavar="SIZE",
        help="memory budget for a checkpoint directory, such as 800MB (default: 4GB)")
    # fmt: on


def _add_prune(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    add = command.add_argument
    # fmt: off
    add("-s", "--sparsity", action="append", metavar="S",
        help="fraction to remove: 0.9; 'PATTERN=0.9' for some layers, may be repeated; "
        "erk:0.9, er:0.9 or uniform_plus:0.9 to allocate it to the layers; none with "
        "--structure N:M; with units across layers, the fraction of units")
    add("--params", type=number, metavar="P",
        help="in place of --sparsity, with units across layers: what remains of the model's "
        "parameters, a fraction such as 0.5 or a number such as 25000000")
    add("--flops", type=number, metavar="F", help="the same for the model's FLOPs")
    add("--structure", metavar="STRUCTURE",
        help="what is removed together: 2:4 keeps 2 of every 4 consecutive inputs (also 2:4/out, "
        "2:4/flat, 2:4/transposable); 16x16, blocks of 16 outputs by 16 inputs; row, outputs; "
        "column, inputs; units across layers: channel; head, of attention; expert, of a mixture; "
        "unit, inner channels of feed-forward blocks (default: single weights)")
    _add_choice(command, "--aggregate", ("energy", "mean", "exact"),
                "what a block, row or column is worth: the root of the sum of squared scores, "
                "their mean, or the norm of what the linear neighborhood loses with it (lookahead, "
                "lookback, lookforward, magnitude)")
    add("--multiple-of", type=_count, default=1, metavar="N",
        help="keep a multiple of so many blocks, rows or columns in every layer (default: 1)")
    add("--strict", action="store_true",
        help="make it an error if --structure does not fit a layer, which stays dense otherwise")
    add("--cost", choices=("weights", "flops"), metavar="COST",
        help="what a unit across layers costs, by which its worth is divided: weights, flops "
        "(default: each the same)")
    add("--uniform", action="store_true",
        help="remove the same number of units across layers from every layer of a kind")
    add("-o", "--out", type=Path, required=True, metavar="DIR",
        help="new directory for the pruned model")
    _add_choice(command, "--scope", ("layer", "global"),
                "rank the weights of each layer, or of all layers together")
    _add_choice(command, "--order", ("parallel", "forward", "backward"),
                "score all layers before any is pruned, or one after the other")
    add("--rounds", type=_count, default=1, metavar="N",
        help="prune in so many rounds, and score anew in between (default: 1)")
    add("--min-keep", type=number, metavar="N",
        help="weights that every layer keeps at least: a number, or a fraction such as 0.01")
    _add_scoring(command)
    add("--report", type=Path, metavar="FILE.html", help="write an HTML report")
    add("--plot", type=Path, metavar="FILE.png",
        help="write a plot of the layers, and FILE-distributions.png")
    add("--force", action="store_true",
        help="replace an earlier result at --out, and any file at --report and --plot")
    # fmt: on


def _add_score(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    _add_scoring(command)
    command.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        help="write the scores to a new safetensors file, one tensor for each layer",
    )


def _add_inspect(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    add = command.add_argument
    # fmt: off
    add("--dot", action="store_true", help="print the graph for Graphviz")
    add("--wide", action="store_true",
        help="show all names and neighbors, whatever the width of the terminal")
    # fmt: on


def _add_verify(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    # fmt: off
    add("pruned", type=Path, metavar="PRUNED", help="checkpoint directory or safetensors file")
    add("original", type=Path, metavar="ORIGINAL", help="checkpoint directory or safetensors file")
    add("-s", "--sparsity", action="append", metavar="S",
        help="sparsity that the kept weights must match, as for prune (default: as recorded)")
    _add_choice(command, "--scope", ("layer", "global"), "of --sparsity")
    # fmt: on


def _add_report(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    # fmt: off
    add("result", type=Path, metavar="RESULT",
        help="what prune has written: the directory, or a file with its --json")
    _add_model(command, required=False)
    add("-o", "--out", type=Path, metavar="FILE.html",
        help="the page (default: the name of RESULT with .html)")
    add("--force", action="store_true", help="replace a file that lap-ext did not write")
    # fmt: on


def _add_bench(command: argparse.ArgumentParser) -> None:
    _add_model(command, required=False)
    add = command.add_argument
    # fmt: off
    add("-s", "--sparsity", type=float, default=0.9, metavar="S",
        help="fraction to remove (default: 0.9)")
    add("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: cpu)")
    # fmt: on


def _add_demo(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    # fmt: off
    add("--seeds", type=_count, default=3, metavar="N", help="dense nets to train (default: 3)")
    add("--steps", type=_count, default=200, metavar="N", help="fine-tuning steps (default: 200)")
    add("-o", "--out", type=Path, default=Path("demo-out"), metavar="DIR",
        help="directory for the plot (default: demo-out)")
    # fmt: on


def _add_info(_command: argparse.ArgumentParser) -> None:
    """Adds no options."""


_SUBCOMMANDS = {
    "prune": ("prune a model and write it to a directory", _add_prune, f"{_MODEL}\n{_EXAMPLES}"),
    "score": ("score every weight of a model", _add_score, f"{_MODEL}\n{_SCORE}"),
    "inspect": ("show the layers, their neighbors, sizes and zeros", _add_inspect, _MODEL),
    "verify": ("check a pruned checkpoint against its original", _add_verify, _VERIFY),
    "report": ("make the HTML page of an earlier result", _add_report, f"{_REPORT}\n{_MODEL}"),
    "bench": ("time lap_ext on this machine", _add_bench, f"{_MODEL}\n{_BENCH}"),
    "demo": ("train, prune by lookahead and by magnitude, compare", _add_demo, ""),
    "info": ("show versions and which kernels are loaded", _add_info, ""),
}


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def memory(text: str) -> int:
    """Reads a size in bytes.

    Example:
        >>> memory("4GB"), memory("1.5 GiB"), memory("800m")
        (4000000000, 1610612736, 800000000)
    """
    size = parsed_size(text)
    if size is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 4GB or 512MiB, got {text!r}")
    return size


def number(text: str) -> int | float:
    """Reads a number of weights, or a fraction.

    Example:
        >>> number("10"), number("0.01")
        (10, 0.01)
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise argparse.ArgumentTypeError(f"expected a number such as 10 or 0.01, got {text!r}")


def completion(shell: str) -> str:
    """Writes a script that completes subcommands, options, their choices, and files.

    Raises:
        ModuleNotFoundError: shtab is not installed.

    Example:
        >>> "inspect" in completion("bash"), completion("zsh").startswith("#compdef lap-ext")
        (True, True)
    """
    try:
        import shtab
    except ModuleNotFoundError:
        raise LapImportError(
            "the shtab package (it writes completion scripts)",
            "none",
            "Run: pip install shtab.",
            name="shtab",
        ) from None
    parser = build()
    for command in _subparsers(parser).values():
        for action in command._actions:
            if action.type is Path or action.dest == "model":
                vars(action)["complete"] = shtab.FILE
    return shtab.complete(parser, shell)


def _subparsers(parser: argparse.ArgumentParser) -> Mapping[str, _Parser]:
    """Finds the parsers of the subcommands."""
    (action,) = (x for x in parser._actions if isinstance(x, argparse._SubParsersAction))
    return action.choices
