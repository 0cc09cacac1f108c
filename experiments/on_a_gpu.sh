#!/usr/bin/env bash
# Benchmark a GPU and train the study's models on it, on a machine that is lent for minutes and has no network.
#
#     lens-positions pack --output packed --corpus bilingual bilingual-large --most 60     (where there is a network)
#     bash packed/experiments/on_a_gpu.sh OUT SECONDS                                      (there, beside the folder)
#
# What is done by the end of SECONDS is in OUT: gpu.json, results.tar.xz, and finished models in half precision. Runs
# that the time cuts off are left in packed/runs with their checkpoints, and the same command goes on with them.
set -u
out=$(mkdir -p "$1" && cd "$1" && pwd)
seconds=$2
began=$(date +%s)
cd "$(dirname "$0")/.." || exit
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=6

spent() { echo $(($(date +%s) - began)); }
[ -d site-packages ] || sh install.sh

# The corpora are unpacked once, before several processes ask for them.
sh run python3 - <<'PYTHON' &
from pathlib import Path
from lens_positions.training.data import tokenize_corpus
for name in ("bilingual", "bilingual-large"):
    print(name, tokenize_corpus(name, Path(".cache")).fingerprint)
PYTHON

sh run python3 benchmarks/gpu.py --seconds $((seconds / 7)) --output "$out/gpu.json" > "$out/gpu.log" 2>&1
grep -v -i warn "$out/gpu.log" | tail -n 16
wait
echo "benchmark done after $(spent) s"

# The rest of the time but what writing takes. The processes of a suite share its runs.
left() { echo $((seconds - 40 - $(spent))); }
suite() {
    timeout -s TERM "$(left)" sh run python3 -m lens_positions experiments suite --compile --precision bf16 "$@" \
        >> "runs/suite.log" 2>&1
    echo "suite $* ended with $? after $(spent) s"
}
mkdir -p runs
for variant in per_layer static; do
    suite --preset paper --corpus bilingual-large --steps 5000 --seeds 0 --variants $variant \
        --output runs/paper --results runs/results/paper &
done
for process in 1 2 3 4; do
    (
        sleep $process
        into=(--output runs/long --results runs/results/long)
        suite --preset long --seeds 0 1 --variants static shared per_layer "${into[@]}"
        suite --preset long --seeds 2 --variants static per_layer "${into[@]}"
    ) &
done
wait
echo "training done after $(spent) s"
tail -n 20 runs/suite.log | cut -c1-200

# Copies in half precision: a few MB each.
sh run python3 - "$out" <<'PYTHON'
import shutil
import sys
from pathlib import Path

from lens_positions.checkpoint_files import seal
from safetensors.torch import load_file, save_file

for model in [*Path("runs").glob("*/*/model"), *Path("runs").glob("*/*/at/step-*")]:
    copy = Path(sys.argv[1], "-".join(model.parts[1:]))
    shutil.copytree(model, copy, dirs_exist_ok=True)
    weights = {name: weight.half() for name, weight in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    seal(copy)
PYTHON
tar cJf "$out/results.tar.xz" runs/results runs/suite.log runs/*/*/log.jsonl runs/*/*/training.json
ls -l "$out"
echo "all done after $(spent) s"
