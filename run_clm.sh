#!/usr/bin/env bash
# Trains or fine-tunes an OPT model on text with a ColossalAI strategy. The one place where torchrun is called.
#
# Hardware: NVIDIA GPUs, or two CPU cores for a rehearsal.
# Time: the first call makes .venv (1 to 8 minutes); a rehearsal about a minute; training as long as its data.
#
#   bash run_clm.sh                                            # opt-6.7b on WikiText-2, one GPU; no GPU: a rehearsal
#   bash run_clm.sh 32 0 125m 4                                # batch 32 a GPU, no memory cap, 125m, 4 GPUs
#   bash run_clm.sh 8 40 1.3b 2 --plugin gemini                # at most 40 GB of each GPU
#   bash run_clm.sh 4 0 tiny 2 --from_scratch --train_file my.txt --tokenizer_name my-tokenizer   # no hub needed
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash run_clm.sh 8 0 13b 8                # on node0; NODE_RANK=1 on the other
set -euo pipefail
# shellcheck source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

usage() {
  cat <<'USAGE'
usage: bash run_clm.sh [batch-size-per-gpu=16] [mem-cap-GB=0] [model=6.7b] [gpu-num=1] [train_clm.py flags...]

  batch-size-per-gpu  rows of one micro-batch on each GPU
  mem-cap-GB          memory cap of each GPU in GB (10^9 bytes); 0: none
  model               tiny 125m 350m 1.3b 2.7b 6.7b 13b 30b 66b 175b, a local folder, or a hub id
  gpu-num             processes on this machine, one a GPU; without a GPU, CPU processes
  flags               passed on and last, so yours win; all of them: python train_clm.py --help

Without a GPU, a positional argument and --model_name_or_path it rehearses `tiny` for about a minute.

Environment:
  NNODES NODE_RANK MASTER_ADDR [MASTER_PORT=29500]   several machines: the same command on each, its own NODE_RANK
  RDZV_ENDPOINT=host:port [RDZV_ID=clm]              the same without ranks: torchrun's c10d rendezvous
  MAX_RESTARTS      after a lost rank, start all again this often, from the last checkpoint (default: 0)
  OMP_NUM_THREADS   threads a process (default: this machine's cores / gpu-num)
  PYTHON            interpreter that .venv is made of (default: python3)
  SKIP_SETUP=1      make no .venv, use PYTHON as it is (conda, containers, clusters)
  TORCHRUN          another torchrun command, in an environment of its own: no .venv is made
  DRY_RUN=1         print the command and stop

Exit code: 0 done, 1 a failure, 2 bad arguments, 3 out of memory, 4 loss not finite, 130 / 143 / 138 interrupted by Ctrl-C,
SIGTERM, SIGUSR1 after a checkpoint.
USAGE
}

help_if_asked "$@"
parse_arguments 6.7b "$@"
choose_python
choose_torchrun
: "${OMP_NUM_THREADS:=$(share_cores)}"
export OMP_NUM_THREADS

command=(
  "${torchrun[@]}" "$launcher_dir/train_clm.py"
  --per_device_train_batch_size "$batch_size"
  --mem_cap "$mem_cap"
  --model_name_or_path "$model"
  ${flags[@]+"${flags[@]}"}
)
if [[ ${DRY_RUN:-} == 1 ]]; then
  printf 'OMP_NUM_THREADS=%s' "$OMP_NUM_THREADS"
  printf ' %q' "${command[@]}"
  echo
  exit
fi
[[ -n ${TORCHRUN:-} ]] || bash "$launcher_dir/setup.sh"
run_supervised "${command[@]}"
