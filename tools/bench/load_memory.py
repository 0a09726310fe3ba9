"""Loading a checkpoint of random bfloat16 weights: seconds and peak memory beside those of transformers.

    python tools/bench/load_memory.py --preset gpt2-1.5b --out results/load.json
    python tools/bench/load_memory.py --preset llama2-7b --only jaxllm jaxllm-decode

Each load is a process of its own. The checkpoint is written shard by shard, so that a 7B one fits a small machine.
Pages of the files are in the page cache when the loads begin, and are not counted.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from machine import describe, report

from jaxllm.core import files
from jaxllm.core.tree import named_leaves
from jaxllm.data.tokenizers.tokenizer import byte_tokenizer
from jaxllm.hf.checkpoint import Writer
from jaxllm.hf.rows import sizes_of
from jaxllm.hf.table import names, stacked, stored_shape
from jaxllm.huggingface import _write_tokenizer, words_for
from jaxllm.models import presets
from jaxllm.models.accounting import param_count
from jaxllm.models.build import abstract_params

# The peak is read from the kernel (VmHWM, kB); what importing costs is measured first and taken off.
PEAK = "import re; peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 2**20\n"
LOADS = {
    "jaxllm": "import sys, time, jax, jaxllm.huggingface\nfrom jaxllm.sharding import distributed\n"
    "distributed.start(distributed.PlatformConfig()); jax.devices(); before = peak(); start = time.perf_counter()\n"
    "lm = jaxllm.huggingface.load(sys.argv[1])\njax.block_until_ready(lm.params)\n",
    "transformers": "import sys, time, torch, transformers\nbefore = peak(); start = time.perf_counter()\n"
    "lm = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto')\n"
    "total = sum(p.sum().item() for p in lm.parameters())\n",  # or the weights would stay in the mapped file
}
# Greedy, from three tokens: the second run of each length is timed, and the difference of two lengths counts.
LOADS["jaxllm-decode"] = LOADS["jaxllm"] + (
    "from jaxllm.inference.decode import Limits, Request\nfrom jaxllm.inference.sampling import Sampler\n"
    "load_s = time.perf_counter() - start\n"
    "def run(count):\n    begin = time.perf_counter()\n"
    "    lm.decoder.generate([Request([5, 6, 7])], Sampler(temperature=0), Limits(count))\n"
    "    return time.perf_counter() - begin\n"
    "first_s = run(2); token_s = (run(10) - run(2)) / 8; start = time.perf_counter() - load_s\n"
)
SAY = (
    "import json; found = {'seconds': time.perf_counter() - start, 'peak_gib': peak() - before}\n"
    "print(json.dumps(found | {name: globals()[name] for name in ('first_s', 'token_s') if name in globals()}))\n"
)


def main() -> int:
    """Write, load, print, delete."""
    arguments = _parser().parse_args()
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
        path = Path(directory) / "model"
        results["checkpoint"] = write(path, arguments.preset)
        for name in arguments.only or LOADS:
            command = [sys.executable, "-c", PEAK + LOADS[name] + SAY, str(path)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results[name] = json.loads(done.stdout.splitlines()[-1])
            sys.stdout.write(f"{name}: {results[name]}\n")
        shutil.rmtree(path)
    versions = {"all": {name: version(name) for name in ("jax", "torch", "transformers", "safetensors")}}
    report({"machine": describe(), "versions": versions, **results}, arguments.out)
    return 0


def write(path: Path, preset: str) -> dict:
    """Write a checkpoint of random weights and return what it measures."""
    config = presets.get(preset)
    family, raw = words_for(config)
    path.mkdir()
    writer, sizes, leaves = Writer(path), sizes_of(config), named_leaves(abstract_params(config))
    noise = (0.02 * np.random.default_rng(0).standard_normal(2**24)).astype("bfloat16")
    largest = 0
    for row in family.rows(config):
        shape = stored_shape(row, leaves[row.ours].shape[stacked(row) :], sizes)
        for name in names(row, sizes):
            tensor = np.resize(noise, shape)
            largest = max(largest, tensor.nbytes)
            writer.add(name, tensor)
    writer.close()
    files.write_json(
        path / "config.json",
        {"model_type": family.model_type, "architectures": [family.architecture], **raw, "dtype": "bfloat16"},
    )
    _write_tokenizer(byte_tokenizer(), path)
    found = {"parameters": param_count(config), "gib": 2 * param_count(config) / 2**30, "largest_gib": largest / 2**30}
    sys.stdout.write(f"{preset}: {found}\n")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2-1.5b", help="shape of the model (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=tuple(LOADS), help="which loads (default: all)")
    parser.add_argument("--dir", help="where the checkpoint is written (default: the system's directory for such)")
    parser.add_argument("--out", help="JSON file for the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
