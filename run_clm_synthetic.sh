#!/usr/bin/env bash
# Trains an OPT model of random weights on random tokens: no data, no tokenizer, no hub. Shows speed and memory.
#
# Hardware: NVIDIA GPUs, or two CPU cores for a rehearsal.
# Time: the first call makes .venv (1 to 8 minutes); a rehearsal about a minute.
#
#   bash run_clm_synthetic.sh                                   # 125m on one GPU; no GPU: a rehearsal
#   bash run_clm_synthetic.sh 32 0 125m 4 --plugin gemini       # 4 GPUs
#   bash run_clm_synthetic.sh 4 0 tiny 2 --plugin hybrid_parallel --tp 2 --max_train_steps 20   # two CPU processes
set -euo pipefail
# shellcheck source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

usage() {
  cat <<'USAGE'
usage: bash run_clm_synthetic.sh [batch-size-per-gpu=16] [mem-cap-GB=0] [model=125m] [gpu-num=1] [train_clm.py flags...]

run_clm.sh with --dataset synthetic --from_scratch: random tokens, random weights. Its -h explains the arguments,
the environment variables and the exit codes.

Without a GPU, a positional argument and --model_name_or_path it rehearses `tiny` for about a minute.
USAGE
}

help_if_asked "$@"
parse_arguments 125m "$@"
exec bash "$launcher_dir/run_clm.sh" "$batch_size" "$mem_cap" "$model" "$num_processes" \
  --dataset synthetic --from_scratch ${flags[@]+"${flags[@]}"}
