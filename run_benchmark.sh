#!/usr/bin/env bash
# Measures throughput and peak memory of each plugin x model size x batch size x GPU count, and prints one table.
#
# Hardware: NVIDIA GPUs, or two CPU cores for a rehearsal.
# Time: about two minutes a cell on a GPU (the first steps compile); the CPU rehearsal about a minute and a half.
#
#   bash run_benchmark.sh                                                  # 125m, every plugin, batch 8, 32 and 128
#   MODELS="125m 1.3b" PLUGINS="low_level_zero gemini" BATCH_SIZES=16 GPUS="1 4" bash run_benchmark.sh
#   CELL_TIMEOUT=60 bash run_benchmark.sh --compile off                    # flags go to train_clm.py
set -euo pipefail
# shellcheck source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

usage() {
  cat <<'USAGE'
usage: [VARIABLE=value...] bash run_benchmark.sh [train_clm.py flags...]

  MODELS="125m"           sizes
  PLUGINS="torch_ddp torch_ddp_fp16 low_level_zero gemini hybrid_parallel"
  BATCH_SIZES="8 32 128"  rows of one micro-batch on each GPU
  GPUS="1 4"              GPU counts; those above what is there are left out
  SEQ_LENS="1024"         tokens a row
  MEM_CAPS="0"            memory caps of each GPU in GB; 0: none
  STEPS=30                steps a cell, the first 5 are not measured
  CELL_TIMEOUT=600        seconds a cell may take
  FORCE=1                 measure again what is already there
  OUT=outputs/benchmark   folder of the results: a folder a cell, table.md, table.csv

Without a GPU the defaults shrink to `tiny` on one process. Each cell is a run of run_clm_synthetic.sh of its own and
gets a row however it ends: ok, oom, nan, timeout or error. Run again, only the missing cells are measured.
USAGE
}

help_if_asked "$@"
if has_gpu; then
  : "${MODELS:=125m}" "${BATCH_SIZES:=8 32 128}" "${GPUS:=1 4}" "${SEQ_LENS:=1024}" "${STEPS:=30}"
  : "${PLUGINS:=torch_ddp torch_ddp_fp16 low_level_zero gemini hybrid_parallel}"
else
  : "${MODELS:=tiny}" "${BATCH_SIZES:=4}" "${GPUS:=1}" "${SEQ_LENS:=64}" "${STEPS:=10}"
  : "${PLUGINS:=torch_ddp low_level_zero gemini hybrid_parallel}"
  echo "No GPU: rehearsing the sweep with the 'tiny' model (-h shows the settings)." >&2
fi
choose_python
[[ -n ${TORCHRUN:-} ]] || bash "$launcher_dir/setup.sh"
export MODELS PLUGINS BATCH_SIZES GPUS SEQ_LENS STEPS
exec "$python" "$launcher_dir/benchmarks/sweep.py" "$@"
