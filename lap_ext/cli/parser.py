# SPDX-License-Identifier: MIT
"""The arguments of lap-ext. Needs nothing but Python; completion scripts are shtab's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lap_ext
from lap_ext._files import parsed_size

_MODEL = """\
MODEL is one of
  a folder          of Hugging Face: config.json and safetensors, sharded or not.
                    It is streamed: it may be larger than memory.
  program.pt2       of torch.export.save. It is read first, and refused if
                    anything in it could run when it is loaded.
  package.module:f  a function of yours that returns a module, or (module,
                    example_inputs). The weights are those of --checkpoint, or
                    as the function made them.
Pickle files (.pt, .pth, .bin) are refused: to load one is to run what is in it.
"""
_EXAMPLES = """\
examples:
  lap-ext prune ./llama --sparsity 0.5 --out ./llama-50 --report llama-50.html
  lap-ext prune my.nets:resnet --checkpoint resnet.safetensors --sparsity 0.9 \\
      --scope global --out ./resnet-90
  lap-ext prune ./bert --sparsity 'encoder.*=0.8' --sparsity 'pooler*=0.5' \\
      --out ./bert-pruned
  lap-ext verify ./llama-50 ./llama
"""
_MORE = """\
  lap-ext VERB --help                     what a verb takes
  eval "$(lap-ext --completion bash)"     completion in this shell

exit status:
  0 well; 1 verify has findings; 2 a mistake or a bad file, told in one line;
  130 stopped with Ctrl-C. Nothing is half-written, the original never touched.
"""
_SCORE = """\
The table has for each layer how many scores are zero (a dead channel before or
after); the smallest, the median, the largest, and those that 10 % and 90 % of
the weights do not exceed; and the energy, which is the sum of the squares.

example:
  lap-ext score ./llama --out llama-scores.safetensors
"""
_VERIFY = """\
Every kept weight must have its original's bits, every pruned one must be zero,
and the counts those that were asked for. Exit status 1 if anything is not so.

example:
  lap-ext verify ./llama-50 ./llama
"""
_BENCH = """\
lap_ext.mask is timed beside what one writes without it: the scores in PyTorch,
then topk, kthvalue or a stable sort. Results are compared first. Calls are
timed in pairs, side by side; the ratio is the median over the pairs of (the
other's time / lap_ext's). Where 1 is between its quartiles, neither is known to
be faster. Weights are random, of the shapes of MODEL's layers.

examples:
  lap-ext bench
  lap-ext bench ./llama --sparsity 0.5
"""
_CRITERIA = ("lookahead", "lookforward", "lookback", "magnitude", "magnitude_bn", "random")
_SHELLS = ("bash", "zsh", "fish", "tcsh")


class _Parser(argparse.ArgumentParser):
    """One line for a mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


class _Completion(argparse.Action):
    """Prints a script and ends."""

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
    """The options; SystemExit after --help, --version, --completion or a mistake."""
    return build().parse_args(argv)


def build() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    raw: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = _Parser(
        prog="lap-ext",
        description="Lookahead pruning of models and checkpoints.",
        epilog=f"{_EXAMPLES}{_MORE}",
        **raw,
    )
    parser.add_argument("--version", action="version", version=f"lap_ext {lap_ext.__version__}")
    parser.add_argument(
        "--completion",
        action=_Completion,
        choices=_SHELLS,
        metavar="SHELL",
        help=f"print a completion script: {', '.join(_SHELLS)}",
    )
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    for name, (text, fill, epilog) in _VERBS.items():
        about = f"{text[0].upper()}{text[1:]}."
        verb = verbs.add_parser(name, help=text, description=about, epilog=epilog, **raw)
        fill(verb)
        add = verb.add_argument
        add("--json", action="store_true", help="the result as JSON on stdout")
        add("--quiet", action="store_true", help="no progress on stderr")
        add("--debug", action="store_true", help="the traceback of an error")
    return parser


def _model(verb: argparse.ArgumentParser, needed: bool = True) -> None:
    add = verb.add_argument
    # fmt: off
    add("model", nargs=None if needed else "?", metavar="MODEL",
        help="a folder, a .pt2 program or package.module:factory, see below")
    add("--checkpoint", type=Path, metavar="FILE",
        help="safetensors weights for a factory's model")
    add("--input", action="append", default=[], metavar="SHAPE",
        help="an example input, such as 1x3x224x224 or 1x16:int64, if the factory gives none")
    _choice(verb, "--unknown", ("error", "stop"),
            "at an operation that the trace does not understand")
    # fmt: on


def _choice(
    verb: argparse.ArgumentParser, name: str, choices: Sequence[str], text: str
) -> None:  # fmt: skip
    """An option whose first choice is the default."""
    shown = f"{text}: {', '.join(choices)} (default: {choices[0]})"
    metavar = name.removeprefix("--").upper()
    verb.add_argument(name, choices=choices, default=choices[0], metavar=metavar, help=shown)


def _scoring(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    # fmt: off
    _choice(verb, "--criterion", _CRITERIA, "what scores a weight")
    _choice(verb, "--normalize", ("none", "norm", "lamp"), "scores between layers")
    add("--exclude", action="append", default=[], metavar="PATTERN",
        help="names of layers that are left alone, such as 'lm_*'; may be repeated")
    _choice(verb, "--bn", ("paper", "fold", "off"), "how batch norms count")
    add("--memory", type=memory, metavar="SIZE",
        help="budget for a folder, such as 800MB (default: 4GB)")
    # fmt: on


def _prune(verb: argparse.ArgumentParser) -> None:
    _model(verb)
    add = verb.add_argument
    # fmt: off
    add("--sparsity", action="append", required=True, metavar="S",
        help="fraction to remove: 0.9; 'PATTERN=0.9' for some layers, may be repeated; "
        "erk:0.9, er:0.9 or uniform_plus:0.9 to share it out")
    add("--out", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    _choice(verb, "--scope", ("layer", "global"), "rank each layer by itself, or all together")
    _scoring(verb)
    add("--report", type=Path, metavar="FILE.html", help="write a page about it")
    add("--plot", type=Path, metavar="FILE.png",
        help="write a picture of the layers, and FILE-distributions.png")
    # fmt: on


def _score(verb: argparse.ArgumentParser) -> None:
    _model(verb)
    _scoring(verb)
    verb.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the scores as safetensors, a tensor for each layer; not there yet",
    )


def _inspect(verb: argparse.ArgumentParser) -> None:
    _model(verb)
    verb.add_argument("--dot", action="store_true", help="the graph in Graphviz's language")


def _verify(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    # fmt: off
    add("pruned", type=Path, metavar="PRUNED", help="folder or safetensors file")
    add("original", type=Path, metavar="ORIGINAL", help="folder or safetensors file")
    add("--sparsity", action="append", metavar="S",
        help="that the counts must meet, as for prune (default: as the pruning has recorded it)")
    _choice(verb, "--scope", ("layer", "global"), "of --sparsity")
    # fmt: on


def _bench(verb: argparse.ArgumentParser) -> None:
    _model(verb, needed=False)
    add = verb.add_argument
    # fmt: off
    add("--sparsity", type=float, default=0.9, metavar="S",
        help="fraction to remove (default: 0.9)")
    add("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: cpu)")
    # fmt: on


def _demo(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    # fmt: off
    add("--seeds", type=_count, default=3, metavar="N", help="dense nets to train (default: 3)")
    add("--steps", type=_count, default=200, metavar="N", help="fine-tuning steps (default: 200)")
    add("--out", type=Path, default=Path("demo-out"), metavar="DIR",
        help="folder for the plot (default: demo-out)")
    # fmt: on


def _info(_verb: argparse.ArgumentParser) -> None:
    """Takes no options."""


_VERBS = {
    "prune": ("prune a model and write it to a folder", _prune, f"{_MODEL}\n{_EXAMPLES}"),
    "score": ("score every weight of a model", _score, f"{_MODEL}\n{_SCORE}"),
    "inspect": ("show the layers, who feeds whom, sizes and zeros", _inspect, _MODEL),
    "verify": ("check a pruned checkpoint against its original", _verify, _VERIFY),
    "bench": ("time lap_ext on this machine", _bench, f"{_MODEL}\n{_BENCH}"),
    "demo": ("train, prune by lookahead and by magnitude, compare", _demo, ""),
    "info": ("show versions and which kernels are loaded", _info, ""),
}


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def memory(text: str) -> int:
    """Bytes.

    Example:
        >>> memory("4GB"), memory("1.5 GiB"), memory("800m")
        (4000000000, 1610612736, 800000000)
    """
    size = parsed_size(text)
    if size is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 4GB or 512MiB, got {text!r}")
    return size


def completion(shell: str) -> str:
    """A script that completes verbs, options, their choices, and files.

    Raises:
        ModuleNotFoundError: shtab is not installed.

    Example:
        >>> "inspect" in completion("bash"), completion("zsh").startswith("#compdef lap-ext")
        (True, True)
    """
    try:
        import shtab
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "expected the shtab package (it writes completion scripts), got none. Run: pip "
            "install shtab",
            name="shtab",
        ) from None
    parser = build()
    for verb in _verbs(parser):
        for action in verb._actions:
            if action.type is Path or action.dest == "model":
                vars(action)["complete"] = shtab.FILE
    return shtab.complete(parser, shell)


def _verbs(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    found = [x for x in parser._actions if isinstance(x, argparse._SubParsersAction)]
    return [verb for action in found for verb in action.choices.values()]
