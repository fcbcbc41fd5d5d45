#!/usr/bin/env bash
# Does everything work on this CUDA machine, and what does it cost? No network; three parts of ten minutes at most.
#
#     experiments/gpu_check.sh [tests|attention|training|all] [FOLDER]   # default: all experiments/results/<GPU>-<date>
#
# tests: the operator's and the model's tests on the GPU. Some 150 kernels are compiled for them; with pytest-xdist on
# eight cores at once. attention: the benchmark of attention alone. training: whole steps of a model of GPT-2's size at
# 32k tokens, then 200 of them with the exact and with the SUS backward from the same seed, and their comparison. Each
# command has its own time limit, and the most valuable comes first. FOLDER gets environment.txt, tests.txt,
# attention.txt, attention.json, training.txt, exact.jsonl, sus.jsonl and comparison.png: commit them. Exit status 0 only
# if all of it passed.
# PYTHON=... chooses the interpreter (default: python3; it needs torch with CUDA, pytest, matplotlib).
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 WANDB_MODE=disabled
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: $PYTHON sees no CUDA device through torch; set PYTHON=... to one that does" >&2
    exit 1
fi
gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace("NVIDIA ", "").replace(" ", "-"))')
part=${1:-all}
case $part in
tests | attention | training | all) ;;
*) echo "error: $part is none of tests, attention, training, all" >&2 && exit 1 ;;
esac
runs() { [ "$part" = all ] || [ "$part" = "$1" ]; }
folder=${2:-experiments/results/$gpu-$(date +%Y-%m-%d)}
mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0

{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    "$PYTHON" -c 'import platform, torch; print("python", platform.python_version()); print("torch", torch.__version__, "cuda", torch.version.cuda)'
    "$PYTHON" -c 'import triton; print("triton", triton.__version__)' 2>/dev/null || echo "triton: none"
    echo "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
} | tee "$folder/environment.txt"

if runs tests; then
cores=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n 8 --dist worksteal")
timeout 570 "$PYTHON" -m pytest -q -m "not slow" $cores tests/test_triton.py tests/test_cuda.py tests/test_reference.py \
    tests/test_sus_attention.py tests/test_model.py 2>&1 | tee "$folder/tests.txt" || status=1
fi
if runs attention; then
timeout 150 "$PYTHON" experiments/bench_attention.py --device=cuda --T=8192,32768,131072 --c=2,4,8 --repeats=5 --peer_seconds=2 \
    --json="$folder/attention.json" 2>&1 | tee "$folder/attention.txt" || status=1
timeout 80 "$PYTHON" experiments/bench_attention.py --device=cuda --D=128 --T=8192,32768 --c=4 --repeats=5 --peer_seconds=2 \
    2>&1 | tee -a "$folder/attention.txt" || status=1
fi
if runs training; then
: >"$folder/training.txt"
# bytes, as the data come along; the model is that of GPT-2 tokens but for the embedding
[ -e data/stdlib/train.bin ] || "$PYTHON" data/stdlib/prepare.py
timeout 150 "$PYTHON" experiments/bench_train.py config/long_ctx_124m.py --T=32768 --dataset=stdlib --repeats=3 \
    --gradient_accumulation_steps=1 2>&1 | tee -a "$folder/training.txt" || status=1

# Exact first: what a limit cuts off is then the slower one.
for backward in exact sus; do
    timeout 200 "$PYTHON" train.py config/long_ctx_124m.py --dataset=stdlib --gradient_accumulation_steps=1 --max_iters=200 \
        --lr_decay_iters=200 --warmup_iters=20 --eval_interval=50 --eval_iters=4 --log_interval=10 \
        --wandb_run_name="$backward" --attn_backward="$backward" --out_dir="$work/$backward" 2>&1 | tee -a "$folder/training.txt" || status=1
    cp "$work/$backward/metrics.jsonl" "$folder/$backward.jsonl" || status=1
done
timeout 40 "$PYTHON" experiments/compare_runs.py "$work/exact" "$work/sus" --out="$folder/comparison.png" 2>&1 |
    tee -a "$folder/training.txt" || status=1
fi
if [ $status = 0 ]; then echo "gpu check passed: $folder"; else echo "gpu check FAILED: see $folder" >&2; fi
exit $status
