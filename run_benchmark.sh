#!/usr/bin/env bash
# Measures throughput and peak memory of each model x plugin x batch x GPUs; ends in tables, pictures and a page.
#
# Hardware: NVIDIA GPUs, or two CPU cores for a rehearsal.
# Time: see -h.
#
#   bash run_benchmark.sh                                                  # 125m, every plugin, batch 8, 32 and 128
#   MODELS="125m 1.3b" PLUGINS="low_level_zero gemini" BATCH_SIZES=16 GPUS="1 4" bash run_benchmark.sh
#   REPEATS=3 MEM_CAPS="0 20" CELL_TIMEOUT=120 bash run_benchmark.sh --compile off    # flags go to train_clm.py
#   python report.py outputs/before outputs/after                          # two sweeps, cell by cell
set -euo pipefail
# shellcheck source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

usage() {
  cat <<'USAGE'
usage: [VARIABLE=value...] bash run_benchmark.sh [train_clm.py flags...]

Lists; every combination is a cell:
  MODELS="125m"           sizes, local folders or hub ids
  PLUGINS="torch_ddp torch_ddp_fp16 low_level_zero gemini hybrid_parallel"
  BATCH_SIZES="8 32 128"  rows of one micro-batch on each GPU
  GPUS="1 4"              GPU counts, by default cut to what is there
  SEQ_LENS="1024"         tokens a row
  PRECISIONS="auto"       auto bf16 fp16 fp32
  MEM_CAPS="0"            memory caps of each GPU in GB; 0: none

  STEPS=30                steps a run, of which the first 5 are not measured
  REPEATS=1               runs a cell: the table has their median and spread
  CELL_TIMEOUT=600        seconds a run may take
  SKIP_ABOVE=1.5          skip a cell predicted to need this many times the memory there is; 0: try all
  FORCE=1                 measure again what is there; or only some states: FORCE="error timeout"
  OUT=outputs/benchmark   folder of the results
  DRY_RUN=1               print the commands and stop, after the set-up

Time: the default is 15 cells on one GPU, ten minutes on an H200, and 30 on four or more, each at most CELL_TIMEOUT; most
of it is start and compilation. Without a GPU the defaults shrink to six cells of `tiny` on one process: about a minute
on two idle cores.

Each cell is a run of run_clm_synthetic.sh of its own and a row of the table however it ends: ok, oom, timeout, error,
nan, or skipped (refused by the planner or as an impossible combination), with the reason. Ctrl-C keeps what is done;
run again, only what is missing is measured.

OUT then holds table.md, table.csv, table.json (with every run's result.json), pictures as .png and .svg, report.html
(opens without a network), and cells/, a folder a cell with logs. `python report.py A B` compares two such folders.

Exit code: 0 done, 1 no cell is ok, 2 bad settings, 130 / 143 interrupted.
USAGE
}

help_if_asked "$@"
choose_python
[[ -n ${TORCHRUN:-} ]] || bash "$launcher_dir/setup.sh"
has_gpu || echo "No GPU: what is not set shrinks to a rehearsal with the 'tiny' model (-h shows the settings)." >&2
# The modules are found from the project's folder; the user's relative paths from his own.
export PYTHONPATH="$launcher_dir${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m benchmarks.sweep "$@"
