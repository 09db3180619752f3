# SPDX-License-Identifier: MIT
"""A checkpoint larger than its budget: pruning it, beside copying it.

    python -m benchmarks.bench_checkpoint

A random bfloat16 checkpoint in the shapes of Llama with 7 billion parameters is made under build/,
which git ignores, and removed at the end: it needs two and a half times its 13.5 GB of disk. Then
in turns:

    cp      cp -r of the directory, then sync -f: until the copy is on the disk
    prune   lap_ext.checkpoint.prune in a process of its own, which ends with everything on the disk

peak is the kernel's own count of the resident set of the whole process (interpreter, libraries and
trace included), anonymous the part of it that is no file, looked at every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import machine
from lap_ext import checkpoint
from lap_ext.options import Scope

LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
SHARD = 5 * 10**9  # bytes of a file, as transformers saves it
SPARSITY = 0.5
RESULTS = machine.ROOT / "benchmarks" / "results" / "checkpoint-7b.json"
SCRATCH = machine.ROOT / "build" / "checkpoint"
_CHUNK = 1 << 24  # random numbers at a time
_LOOK_S = 0.02


def make(directory: Path, config: dict[str, int]) -> dict[str, Any]:
    """Writes a checkpoint directory of random weights in these shapes, shard by shard."""
    import transformers

    kinds: Any = transformers
    made = kinds.LlamaConfig(**config, dtype="bfloat16")
    made.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = kinds.LlamaForCausalLM._from_config(made)
    directory.mkdir(parents=True)
    made.save_pretrained(directory)
    shards: list[dict[str, Tensor]] = [{}]
    for name, x in model.state_dict().items():
        if sum(y.nbytes for y in shards[-1].values()) + x.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = x
    table: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write(directory / file, shard)
        table |= dict.fromkeys(shard, file)
    size = sum(x.nbytes for x in model.state_dict().values())
    index = {"metadata": {"total_size": size}, "weight_map": table}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    parameters = sum(x.numel() for x in model.parameters())
    return {"parameters": parameters, "bytes": size, "tensors": len(table), "shards": len(shards)}


def write(path: Path, shard: dict[str, Tensor]) -> None:
    """Writes a file with random normal bfloat16 numbers in these shapes; norms near 1."""
    header, begin = {}, 0
    for name, x in shard.items():
        offsets = [begin, begin + x.nbytes]
        header[name] = {"dtype": "BF16", "shape": list(x.shape), "data_offsets": offsets}
        begin = offsets[1]
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    data = bytearray(2 * _CHUNK)
    chunk = torch.frombuffer(data, dtype=torch.bfloat16)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in shard.values():
            for first in range(0, x.numel(), _CHUNK):
                count = min(_CHUNK, x.numel() - first)
                chunk[:count].normal_(0.0 if x.dim() > 1 else 1.0, 0.02)
                file.write(memoryview(data)[: 2 * count])


def copied(source: Path, out: Path) -> dict[str, float]:
    """Times cp -r, and cp -r with the copy on the disk."""
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    middle = time.perf_counter()
    subprocess.run(["sync", "-f", str(out)], check=True)
    end = time.perf_counter()
    shutil.rmtree(out)
    return {"cp_s": middle - begin, "cp_synced_s": end - begin}


def pruned(source: Path, out: Path, memory: str, scope: str, threads: int) -> dict[str, Any]:
    """Measures seconds and memory of a process that prunes."""
    args = ["--child", str(source), str(out), memory, scope, str(threads)]
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_checkpoint", *args],
        cwd=machine.ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    process = time.perf_counter() - begin
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    check(source, out, told.pop("rows"))
    shutil.rmtree(out)
    return {"scope": scope, "process_s": process, **told}


def child(source: str, out: str, memory: str, scope: str, threads: str) -> None:
    """Prunes, and prints what it took."""
    torch.set_num_threads(int(threads))
    ends: dict[str, float] = {}
    peak = Peak()
    begin = time.perf_counter()

    def report(progress: checkpoint.Progress) -> None:
        ends.setdefault("check and trace", time.perf_counter() - begin)
        ends[progress.step] = time.perf_counter() - begin

    result = checkpoint.prune(
        source, out, SPARSITY, memory=memory, scope=cast(Scope, scope), on_progress=report
    )
    seconds = time.perf_counter() - begin
    ends["finish"] = seconds
    steps = {}
    last = 0.0
    for step, end in ends.items():
        steps[step], last = end - last, end
    rows = {row.name: row.kept for row in result.layers}
    facts = {"seconds": seconds, "steps": steps, "sparsity": result.sparsity, "rows": rows}
    print(json.dumps({**facts, **peak.stop()}))


class Peak:
    """The most memory that this process has had."""

    def __init__(self) -> None:
        self._anonymous = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._stop.wait(_LOOK_S):
            self._anonymous = max(self._anonymous, status("RssAnon"))

    def stop(self) -> dict[str, int]:
        """Stops looking; returns bytes."""
        self._stop.set()
        self._thread.join()
        return {"peak_bytes": status("VmHWM"), "peak_anonymous_bytes": self._anonymous}


def status(name: str) -> int:
    """Reads a line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def check(source: Path, out: Path, kept: dict[str, int]) -> None:
    """Compares files and headers, and the counts of weights in the first and last layers."""
    from safetensors import safe_open

    for shard in sorted(source.glob("*.safetensors")):
        heads = []
        for path in (shard, out / shard.name):
            with path.open("rb") as file:
                heads.append(file.read(int.from_bytes(file.read(8), "little")))
        assert heads[0] == heads[1], shard.name
        with safe_open(shard, "pt") as old, safe_open(out / shard.name, "pt") as new:
            names = [name for name in old.keys() if name.removesuffix(".weight") in kept]
            for name in (names[0], names[-1]):
                before, after = old.get_tensor(name), new.get_tensor(name)
                zeros = int((before == 0).count_nonzero())
                left = int(after.count_nonzero())
                assert kept[name.removesuffix(".weight")] - zeros <= left, name
                assert left <= kept[name.removesuffix(".weight")], name
                assert bool(((after == before) | (after == 0)).all()), name


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_checkpoint")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--memory", default="4GB", help="the budget (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=LLAMA_7B["num_hidden_layers"])
    parser.add_argument("--pairs", type=int, default=2, help="of cp and prune (%(default)s)")
    parser.add_argument("--no-global", action="store_true", help="leave out scope='global'")
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the checkpoint, copies and prunes it in turns, writes the results."""
    args = parsed(argv)
    if args.child:
        child(*args.child)
        return
    console = Console(width=120)
    config = LLAMA_7B | {"num_hidden_layers": args.layers}
    shutil.rmtree(SCRATCH, ignore_errors=True)
    source, out = SCRATCH / "dense", SCRATCH / "out"
    try:
        facts = make(source, config)
        console.print(facts)
        subprocess.run(["sync", "-f", str(source)], check=True)
        runs: list[dict[str, Any]] = []
        scopes = ["layer"] * args.pairs + ([] if args.no_global else ["global"])
        for scope in scopes:
            pair = copied(source, out) | pruned(source, out, args.memory, scope, args.threads)
            pair["load"] = machine.load()
            runs.append(pair)
            console.print(pair)
        results = {
            "machine": machine.describe(torch.device("cpu")) | {"threads": args.threads},
            "checkpoint": facts | {"config": config, "dtype": "bfloat16"},
            "memory": args.memory,
            "sparsity": SPARSITY,
            "runs": runs,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)


if __name__ == "__main__":
    main()
