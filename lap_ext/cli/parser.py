# SPDX-License-Identifier: MIT
"""The arguments of lap-ext, and completion scripts made from them. Needs nothing but Python."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import lap_ext

_MODEL = """\
MODEL is one of
  a folder           of Hugging Face: config.json and safetensors, sharded or not. It is streamed:
                     a checkpoint larger than memory is no problem.
  package.module:f   a function of yours that returns a module, or (module, example_inputs). The
                     weights are those of --checkpoint, or as the function made them.
Pickle files (.pt, .pth, .bin, .pt2) are refused: to load one is to run what is in it.
"""
_EXAMPLES = """\
examples:
  lap-ext prune ./llama --sparsity 0.5 --out ./llama-50 --report llama-50.html
  lap-ext prune my.nets:resnet --checkpoint resnet.safetensors --sparsity 0.9 --scope global --out out
  lap-ext prune ./bert --sparsity 'encoder.*=0.8' --sparsity 'pooler*=0.5' --out ./bert-pruned
  lap-ext verify ./llama-50 ./llama
"""
_CRITERIA = ("lookahead", "lookforward", "lookback", "magnitude", "magnitude_bn", "random")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class _Parser(argparse.ArgumentParser):
    """One line for a mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; SystemExit after --help, --version or a mistake."""
    return build().parse_args(_completion_first(sys.argv[1:] if argv is None else argv))


def _completion_first(argv: Sequence[str]) -> Sequence[str]:
    """`--completion bash` is the verb completion, which no help shows."""
    first, equals, shell = argv[0].partition("=") if argv else ("", "", "")
    if first != "--completion":
        return argv
    return ["completion", *([shell] if equals else []), *argv[1:]]


def build() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(
        prog="lap-ext",
        description="Lookahead pruning of models and checkpoints.",
        epilog=f'{_EXAMPLES}\n  eval "$(lap-ext --completion bash)"   completion in this shell',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lap_ext {lap_ext.__version__}")
    parser.add_argument("--completion", metavar="bash|zsh", help="print a script for a shell")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def add(name: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        verb = verbs.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_argument("--json", action="store_true", help="the result as JSON on stdout")
        verb.add_argument("--quiet", action="store_true", help="no progress on stderr")
        verb.add_argument("--debug", action="store_true", help="the traceback of an error")
        return verb

    _prune(add("prune", "prune a model and write it to a folder", f"{_MODEL}\n{_EXAMPLES}"))
    _inspect(add("inspect", "show the layers, who feeds whom, sizes and zeros", _MODEL))
    _verify(add("verify", "check a pruned checkpoint against its original, bit by bit"))
    add("info", "show versions and which kernels are loaded")
    _demo(add("demo", "train, prune by lookahead and by magnitude, compare"))
    shell = verbs.add_parser("completion")
    shell.add_argument("shell", choices=("bash", "zsh"))
    shell.set_defaults(debug=False, json=False, quiet=True)
    return parser


def _model(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "model", metavar="MODEL", help="a folder or package.module:factory, see below"
    )
    verb.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="safetensors weights for a factory's model"
    )
    verb.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE",
        help="an example input, such as 1x3x224x224 or 1x16:int64, if the factory gives none",
    )
    verb.add_argument(
        "--unknown",
        choices=("error", "stop"),
        default="error",
        help="at an operation that the trace does not understand (default: error)",
    )


def _prune(verb: argparse.ArgumentParser) -> None:
    _model(verb)
    add = verb.add_argument
    # fmt: off
    add("--sparsity", action="append", required=True, metavar="S",
        help="fraction to remove: 0.9; 'PATTERN=0.9' for some layers, may be repeated; "
        "erk:0.9, er:0.9 or uniform_plus:0.9 to share it out")
    add("--out", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    add("--scope", choices=("layer", "global"), default="layer",
        help="rank each layer by itself or all layers together (default: layer)")
    add("--criterion", choices=_CRITERIA, default="lookahead", help="default: lookahead")
    add("--normalize", choices=("none", "norm", "lamp"), default="none",
        help="scores between layers (default: none)")
    add("--exclude", action="append", default=[], metavar="PATTERN",
        help="layers that stay as they are, may be repeated")
    add("--bn", choices=("paper", "fold", "off"), default="paper",
        help="how batch norms count (default: paper)")
    add("--memory", type=memory, metavar="SIZE", help="budget for a folder, such as 4GB")
    add("--report", type=Path, metavar="FILE.html", help="write a page about it")
    add("--plot", type=Path, metavar="FILE.png",
        help="write a picture of the layers, and FILE-distributions.png")
    # fmt: on


def _inspect(verb: argparse.ArgumentParser) -> None:
    _model(verb)
    verb.add_argument("--dot", action="store_true", help="the graph in Graphviz's language")


def _verify(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("pruned", type=Path, metavar="PRUNED", help="folder or safetensors file")
    verb.add_argument("original", type=Path, metavar="ORIGINAL", help="folder or safetensors file")
    verb.add_argument(
        "--sparsity",
        action="append",
        metavar="S",
        help="that the counts must meet, as for prune (default: as the pruning has recorded it)",
    )
    verb.add_argument("--scope", choices=("layer", "global"), default="layer")


def _demo(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--seeds", type=_count, default=3, help="dense nets to train (default: 3)")
    verb.add_argument("--steps", type=_count, default=200, help="fine-tuning steps (default: 200)")
    verb.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="folder for the plot (default: demo-out)"
    )


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
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise argparse.ArgumentTypeError(f"expected a size such as 4GB or 512MiB, got {text!r}")
    unit = found[2].upper()
    power = list(_UNITS).index(unit)
    return int(float(found[1]) * (1024**power if found[3] else _UNITS[unit]))


def sparsity(given: Sequence[str]) -> Any:
    """What --sparsity stands for, as prune takes it.

    Example:
        >>> sparsity(["0.9"]), sparsity(["fc*=0.5", "*=0.9"]), sparsity(["erk:0.9"])
        (0.9, {'fc*': 0.5, '*': 0.9}, erk(sparsity=0.9))
    """
    if len(given) == 1 and "=" not in given[0]:
        kind, colon, text = given[0].rpartition(":")
        if not colon:
            return _fraction(text)
        if kind not in ("erk", "er", "uniform", "uniform_plus"):
            raise ValueError(
                f"expected --sparsity 0.9, 'PATTERN=0.9' or erk:0.9, er:0.9, uniform:0.9, "
                f"uniform_plus:0.9, got {given[0]!r}."
            )
        return getattr(lap_ext, kind)(_fraction(text))
    found = {}
    for item in given:
        pattern, equals, text = item.rpartition("=")
        if not equals:
            raise ValueError(
                f"expected one --sparsity, or several of the form 'PATTERN=0.9', got {item!r}."
            )
        found[pattern] = _fraction(text)
    return found


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        cure = f" Did you mean {float(text[:-1]) / 100:g}?" if _percent(text) else ""
        raise ValueError(
            f"expected --sparsity to be a number (the fraction removed), got {text!r}.{cure}"
        ) from None


def _percent(text: str) -> bool:
    return re.fullmatch(r"\d+(\.\d+)?%", text) is not None


def completion(shell: str) -> str:
    """A script that completes verbs, options and their choices; files elsewhere.

    Example:
        >>> "inspect" in completion("bash"), completion("zsh").startswith("#compdef")
        (True, True)
    """
    cases = []
    names = []
    for name, verb in _verbs(build()):
        names.append(name)
        options = [action for action in verb._actions if action.option_strings]
        flags = " ".join(action.option_strings[-1] for action in options)
        cases.append(f'    {name}) words="{flags}" ;;')
        for action in options:
            if action.choices:
                choices = " ".join(map(str, action.choices))
                flag = action.option_strings[-1]
                cases.append(f'    {name}:{flag}) words="{choices}" ;;')
    by_verb = [case for case in cases if ":" not in case.partition(")")[0]]
    by_option = [case for case in cases if ":" in case.partition(")")[0]]
    script = _BASH.format(
        verbs=" ".join(names), options="\n".join(by_option), flags="\n".join(by_verb)
    )
    if shell == "zsh":
        return f"#compdef lap-ext\nautoload -U +X bashcompinit && bashcompinit\n{script}"
    return script


def _verbs(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from (
                (name, verb) for name, verb in action.choices.items() if name != "completion"
            )


_BASH = """\
_lap_ext() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{verbs} --help --version --completion" -- "$cur")); return
  fi
  case "${{COMP_WORDS[1]}}:$prev" in
{options}
  esac
  if [ -z "$words" ]; then
    case "$cur" in -*) case "${{COMP_WORDS[1]}}" in
{flags}
    esac ;; esac
  fi
  if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$cur"))
  else COMPREPLY=($(compgen -f -- "$cur")); fi
}}
complete -o filenames -F _lap_ext lap-ext"""
