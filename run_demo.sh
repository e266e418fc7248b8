#!/usr/bin/env bash
# Fine-tunes opt-350m on the descriptions of 8,807 Netflix shows and prints five descriptions of its own.
#
# Hardware: one NVIDIA GPU, or two CPU cores for a rehearsal.
# Time: the first call makes .venv (1 to 8 minutes); a rehearsal about 5 minutes.
#
#   bash run_demo.sh                                                       # as on the original card
#   GPUS=4 PLUGIN=low_level_zero bash run_demo.sh
#   MODEL=tiny EPOCHS=2 TRAIN_FILE=titles.csv TOKENIZER=opt-tokenizer bash run_demo.sh    # no hub needed
set -euo pipefail
# shellcheck source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

usage() {
  cat <<'USAGE'
usage: [VARIABLE=value...] bash run_demo.sh [train_clm.py flags...]

  MODEL=350m    a size, a local folder or a hub id; tiny has no pretrained weights and starts from random ones
  EPOCHS=10     passes over the descriptions
  BATCH=16      rows of one micro-batch on each GPU
  LR=5e-5       peak learning rate (tiny: its own)
  WARMUP=0.1    warm-up as a share of all steps
  GPUS=1        processes on this machine, one a GPU
  MEM_CAP=0     memory cap of each GPU in GB (10^9 bytes); 0: none
  PLUGIN=auto   ColossalAI strategy
  TRAIN_FILE    local .csv .json .parquet ... with a description column (default: the hub's netflix-shows)
  TOKENIZER     tokenizer folder or hub id (default: the model's own)
  SAMPLES=5     descriptions to print at the end

Without a GPU, MODEL and --model_name_or_path it rehearses `tiny` for 2 epochs.
The environment variables of run_clm.sh (its -h) hold too.
USAGE
}

help_if_asked "$@"
[[ ${1:---} == --* ]] || die "run_demo.sh takes flags and environment variables, got '$1' (-h shows them)"

if [[ -z ${MODEL:-} ]] && ! names_model "$@" && ! has_gpu; then
  MODEL=tiny
  : "${EPOCHS:=2}"
  echo "No GPU and no MODEL given: rehearsing with the 'tiny' model from random weights (-h shows the settings)." >&2
fi
: "${MODEL:=350m}"

command=(
  bash "$launcher_dir/run_clm.sh" "${BATCH:-16}" "${MEM_CAP:-0}" "$MODEL" "${GPUS:-1}"
  --dataset netflix
  --validation_split_percentage 0 # every description trains, as on the original card
  --block_size 128                # the longest description has 64 tokens; the plan is made for what is asked
  --num_train_epochs "${EPOCHS:-10}"
  --warmup_ratio "${WARMUP:-0.1}"
  --plugin "${PLUGIN:-auto}"
  --num_samples "${SAMPLES:-5}"
)
if [[ $MODEL == tiny ]]; then
  command+=(--from_scratch)
  [[ -z ${LR:-} ]] || command+=(--learning_rate "$LR")
else
  command+=(--learning_rate "${LR:-5e-5}")
fi
[[ -z ${TRAIN_FILE:-} ]] || command+=(--train_file "$TRAIN_FILE")
[[ -z ${TOKENIZER:-} ]] || command+=(--tokenizer_name "$TOKENIZER")
exec "${command[@]}" "$@"
