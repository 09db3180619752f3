# SPDX-License-Identifier: MIT
"""lap-ext on modules of a factory; options, files, progress, exit status."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lap_ext
from lap_ext import checkpoint
from lap_ext.cli import commands, models, output, parser
from tests.helpers.command_line import Run, dense, one_line

ROOT = Path(__file__).parents[2]


# --- factories ------------------------------------------------------------------------------------


def test_factory(run: Run, tmp_path: Path) -> None:
    weights = {name: torch.randn_like(value) for name, value in dense().items()}
    save_file(weights, tmp_path / "w.safetensors")
    status, out, _ = run(
        "prune",
        "nets:net",
        "--checkpoint",
        "w.safetensors",
        "--sparsity",
        "0=0.5",
        "--sparsity",
        "2=0.75",
        "--out",
        "deep/out",
        "--report",
        "out.html",
        "--plot",
        "out.png",
    )
    assert status == 0 and "written: deep/out, out.html, out.png" in out
    pruned = load_file(tmp_path / "deep/out/model.safetensors")
    masks = lap_ext.Masks.load(tmp_path / "deep/out/lap_ext_masks.safetensors")
    assert masks.counts() == {"0": (64, 128), "2": (16, 64)}
    for name, weight in weights.items():
        mask = masks.get(name.removesuffix(".weight"))
        assert torch.equal(pruned[name], weight if mask is None else weight * mask)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "lowest kept" in (tmp_path / "out.html").read_text()
    assert run("verify", "deep/out", "w.safetensors")[0] == 0


@pytest.mark.parametrize(
    "model",
    [["nets:bare", "--input", "1x8"], ["nets:bare", "--input", "input=1x8"], ["nets:named"]],
)
def test_factory_inputs(run: Run, model: list[str]) -> None:
    status, out, _ = run("prune", *model, "--sparsity", "erk:0.5", "--out", "out", "--json")
    assert status == 0 and json.loads(out)["kept"] == 96


def test_inspect_factory(run: Run) -> None:
    status, out, _ = run("inspect", "nets:net")
    assert status == 0 and out.splitlines()[2].split() == [
        "0",
        "linear",
        "16x8",
        "128",
        "0.00%",
        "input",
        "2",
    ]
    assert run("inspect", "nets:net", "--dot")[1].startswith("digraph")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nets:nothing"], "expected 'nothing' in 'nets'"),
        (["nowhere:net"], "expected a module 'nowhere' that Python can import"),
        (["nets:value"], "to be a function, got int"),
        (["nets:wrong"], "to return a torch.nn.Module or (module, example_inputs), got int"),
        (["nets:broken"], "RuntimeError: no luck at all. Run it with --debug"),
        (["nets:bare"], "expected example inputs"),
        (["nets:bare", "--input", "1x"], "expected --input such as 1x3x224x224"),
        (
            ["nets:bare", "--input", "input=1x8", "--input", "1x8"],
            "expected a name for all of --input or for none, got input=1x8, 1x8.",
        ),
        (
            ["nets:net", "--checkpoint", "no.safetensors"],
            "expected --checkpoint to be a file that exists, got 'no.safetensors'",
        ),
        (["nets:net", "--checkpoint", "w.pth"], "expected --checkpoint to be a safetensors file"),
        (
            ["nets:net", "--checkpoint", "nets.py"],
            "expected --checkpoint to be a complete safetensors file",
        ),
        (["nowhere"], "and no such directory"),
        (["model.pt2"], "the program 'model.pt2', which can execute any code"),
        (["model.bin"], "can execute any code when it is loaded"),
        (["model.safetensors"], "does not say how its weights are connected"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_models(run: Run, tmp_path: Path, argv: list[str], said: str) -> None:
    assert said in one_line(run("prune", *argv, "--sparsity", "0.5", "--out", "out"))
    assert list(tmp_path.glob("out*")) == list(tmp_path.glob(".out*")) == []


def test_checkpoint_must_fit_strictly(run: Run, tmp_path: Path) -> None:
    weights = dense()
    for file, tensors, said in (
        ("less", {k: v for k, v in weights.items() if k != "2.bias"}, "which lacks 2.bias."),
        ("more", weights | {"x": torch.ones(1)}, "which also has x."),
        ("other", weights | {"2.bias": torch.ones(5)}, "size mismatch for 2.bias"),
    ):
        save_file(tensors, tmp_path / file)
        line = one_line(run("inspect", "nets:net", "--checkpoint", file))
        assert said in line and repr(file) in line


def test_pickles_are_never_loaded(run: Run, tmp_path: Path) -> None:
    """Under any name: what they would run does not run."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "sprung"), "w"))

    for name in ("m.pt2", "m.bin", "m.safetensors", "w.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory/config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "directory/pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    for argv in (["m.pt2"], ["m.bin"], ["m.safetensors"], ["directory"],
                 ["nets:net", "--checkpoint", "w.safetensors"]):  # fmt: skip
        one_line(run("inspect", *argv))
    one_line(run("verify", "w.safetensors", "m.safetensors"))
    one_line(run("verify", "m.pt2", "m.bin"))
    assert not (tmp_path / "sprung").exists()


# --- files ----------------------------------------------------------------------------------------


def test_out_must_be_new(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run("prune", "nets:net", "--sparsity", "0.5", "--out", "out")[0] == 0  # empty: fine
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    line = one_line(run("prune", "nets:net", "--sparsity", "0.9", "--out", "out"))
    assert "expected --out to be a new directory, got 'out'" in line
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_half_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    def fail(*given: object) -> None:
        raise error

    monkeypatch.setattr(lap_ext.Masks, "save", fail)  # after the weights
    shown = run("prune", "nets:net", "--sparsity", "0.5", "--out", "out")
    if error is KeyboardInterrupt:
        assert shown == (130, "", "lap-ext prune: stopped. 'out' was not written.\n")
    else:
        assert "No space left on device" in one_line(shown)
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_page_that_fails_leaves_the_result(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    monkeypatch.setattr("lap_ext.report.page.html", lambda facts: (_ for _ in ()).throw(error))
    shown = run("prune", "nets:net", "--sparsity", "0.5", "--out", "out", "--report", "r.html")
    if error is KeyboardInterrupt:
        assert shown == (130, "", "lap-ext prune: stopped. 'out' was written.\n")
    else:
        said = "lap-ext prune: No space left on device (r.html); 'out' is complete.\n"
        assert one_line(shown) == said
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py", "out"}
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_full_disk_under_the_weights(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors has an error of its own for it."""

    def full(*given: object, **more: object) -> None:
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_model", full)
    line = one_line(run("prune", "nets:net", "--sparsity", "0.5", "--out", "out"))
    assert line == "lap-ext prune: No space left on device (out).\n"
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py"}


def test_warnings_are_lines(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(options: object) -> int:
        warnings.warn("one\nline", stacklevel=1)
        return 0

    monkeypatch.setitem(commands.COMMANDS, "info", warned)  # type: ignore[arg-type]
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert run("info") == (0, "", "lap-ext info: warning: one line\n")
    assert warnings.showwarning is shown


def test_progress_of_a_factory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of the work on a module is reported, the long ones with their total."""
    seen: list[tuple[str, int]] = []
    step, follow = output.Progress.step, output.Progress.follow

    def stepped(self: output.Progress, text: str, total: float = 0) -> None:
        step(self, text, total)
        seen.append((text, int(total)))

    def followed(self: output.Progress, facts: Any) -> None:
        follow(self, facts)
        seen.append((self.text, int(self.total)))

    monkeypatch.setattr(output.Progress, "step", stepped)
    monkeypatch.setattr(output.Progress, "follow", followed)
    for argv, steps in (
        (["prune", "--sparsity", "0.5", "--out", "out", "--report", "r.html"],
         ["make nets:net", "trace", "prune", "measure", "rank", "score", "measure", "score",
          "measure", "draw", "write"]),
        (["score"], ["make nets:net", "trace", "score", "measure", "score"]),
        (["inspect"], ["make nets:net", "trace", "count zeros"]),
    ):  # fmt: skip
        seen.clear()
        assert run(argv[0], "nets:net", *argv[1:])[0] == 0
        texts = [
            text for index, (text, _) in enumerate(seen) if not index or text != seen[index - 1][0]
        ]
        assert sorted(texts) == sorted(steps)
        assert all(total for text, total in seen if text in ("measure", "rank", "count zeros"))


def test_sigterm_cleans_up(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes while the masks are written."""
    monkeypatch.setattr(lap_ext.Masks, "save", lambda *a: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert run("prune", "nets:net", "--sparsity", "0.5", "--out", "out") == (143, "", "")
    assert {path.name for path in tmp_path.iterdir()} == {"nets.py"}
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            ["--report", "no/out.html"],
            "expected --report in a directory that exists, got 'no/out.html'",
        ),
        (["--plot", "out.gifs"], "expected a name that ends in .png"),
        (["--memory", "4GB"], "expected --memory with a checkpoint directory only"),
        (["--sparsity", "0.5"], "expected one --sparsity, or several of the form"),
        (["--exclude", "conv*"], "expected --exclude patterns that name a layer"),
    ],
)
def test_mistakes_before_the_work(run: Run, option: list[str], said: str) -> None:
    assert said in one_line(run("prune", "nets:net", "--sparsity", "0.9", "--out", "x", *option))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("90%", "got '90%'. Did you mean 0.9?"),
        ("90", "expected 0 <= --sparsity <= 1"),
        ("nan", "expected 0 <= --sparsity <= 1"),
        ("half", "got 'half'."),
        ("er_k:0.9", "got 'er_k:0.9'"),
        ("fc=0.5", "names a layer, got 'fc'"),
    ],
)
def test_bad_sparsities(run: Run, given: str, said: str) -> None:
    assert said in one_line(run("prune", "nets:net", f"--sparsity={given}", "--out", "x"))


# --- the rest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["prun"], ["prune"], ["verify", "a"], ["info", "--no"],
                                  ["prune", "m", "--sparsity", "1", "--out", "o", "--memory", "x"],
                                  ["--completion"], ["--completion", "csh"]])  # fmt: skip
def test_wrong_usage_is_one_line(run: Run, argv: list[str]) -> None:
    assert "See lap-ext" in one_line(run(*argv))


def test_help_and_version(run: Run) -> None:
    assert run("--version")[:2] == (0, f"lap_ext {lap_ext.__version__}\n")
    for name in commands.COMMANDS:
        status, out, _ = run(name, "--help")
        assert status == 0 and "--json" in out


def test_info(run: Run) -> None:
    assert run("info")[1] == f"{lap_ext.info()}\n"
    assert json.loads(run("info", "--json")[1])["version"] == lap_ext.__version__


def test_demo(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn has the digits")
    monkeypatch.setattr("lap_ext.demo.TRAIN_STEPS", 5)
    monkeypatch.setattr("lap_ext.demo.ROUNDS", (3,))
    status, out, _ = run("demo", "--seeds", "1", "--steps", "1", "--json")
    assert status == 0 and len(json.loads(out)["levels"]) == 1


def test_debug_shows_where(run: Run) -> None:
    with pytest.raises(RuntimeError, match="no luck"):
        run("inspect", "nets:broken", "--debug")


def test_completion_scripts(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("shtab", reason="shtab writes the scripts")
    (tmp_path / "script").write_text(run("--completion", "bash")[1])
    for shell, begin in (("zsh", "#compdef lap-ext"), ("fish", "#"), ("tcsh", "#")):
        status, out, error = run("--completion", shell)
        assert (status, error) == (0, "") and out.startswith(begin) and "--normalize" in out
    ask = (
        "source ./script; COMP_WORDS=({words}); COMP_CWORD={at}; COMPREPLY=(); _shtab_lap_ext; "
        'echo "${{COMPREPLY[@]}}"'
    )

    def completed(words: str) -> list[str]:
        command = ["bash", "-c", ask.format(words=f"lap-ext {words}", at=len(words.split()))]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("pr") == ["prune"]
    assert completed("prune --sc") == ["--scope"]
    assert completed("prune --scope g") == ["global"]
    assert completed("verify nets") == ["nets.py"]
    assert completed("prune ne") == ["nets.py"]
    assert completed("prune x --out ne") == ["nets.py"]
    assert completed("inspect --on") == ["--on-unsupported"]


def test_completion_without_shtab(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "Run: pip install shtab" in one_line(run("--completion", "bash"))


def test_progress_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no terminal: a line every ten seconds, none for what is quick."""
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with output.Progress(stream=stream) as progress:
        progress.step("read", 100)
        for second in range(1, 31):
            now[0] = second
            progress.advance(2)
            progress.refresh()
    assert stream.getvalue().splitlines() == [
        "read: 20%, 40 s left",
        "read: 40%, 30 s left",
        "read: 60%, 20 s left",
    ]


def test_time_left_counts_from_where_the_work_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not counted (a trace), and steps before, are left out of the estimate."""
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with output.Progress(stream=stream) as progress:
        progress.step("trace")
        for second, step, done in ((100, "measure", 20), (110, "measure", 40), (200, "score", 10),
                                   (210, "score", 50)):  # fmt: skip
            now[0] = second
            progress.follow(checkpoint.Progress(step, "fc", done, 100))
            if done in (40, 50):
                progress.refresh()
    assert stream.getvalue().splitlines() == ["measure: 40%, 15 s left", "score: 50%, 10 s left"]


def test_many_short_steps_are_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step begins its own count; whether a line is due counts from the last line."""
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with output.Progress(stream=stream) as progress:
        progress.step("prune")
        for second in range(25):
            now[0] = second
            progress.follow(
                lap_ext.progress.Progress("rank", f"layer{second // 2}", 4, 8 + second // 2)
            )
            progress.refresh()
    assert stream.getvalue().splitlines() == ["rank ...", "rank ..."]


def test_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="rich draws the bar")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    stream = Terminal()
    with output.Progress(stream=stream) as progress:
        progress.step("read [1]", 100)
        now[0] = 2.0
        progress.advance(50)
        progress.refresh()
    assert "read [1]" in stream.getvalue() and "50%" in stream.getvalue()


def test_module_is_the_command() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "lap_ext", "--version"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"lap_ext {lap_ext.__version__}\n"


def test_help_does_not_load_torch() -> None:
    program = (
        "import sys; from lap_ext.cli import main; main(['--help']); print('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_nothing_is_imported_for_an_input() -> None:
    assert models.example("2x3").shape == (2, 3)
    assert parser.memory("2KiB") == 2048
