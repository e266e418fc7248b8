#!/usr/bin/env bash
# Trains the same tiny OPT under every plugin and shape, compares each run with a plain PyTorch loop that knows no
# ColossalAI, and prints and writes one table. Ends with 1 where a case differs from the loop, or was cut off by Ctrl-C
# or SIGTERM: the table then says so.
#
# Hardware: two CPU cores (1, 2 and 4 ranks on gloo); on NVIDIA GPUs as many ranks as there are GPUs, up to 4, or
# with --ranks_per_gpu several times as many.
# Time: 15 to 40 minutes on two cores, with --quick under three minutes; --jobs divides it where there are more cores.
#
#   bash tests/equivalence.sh                       # the whole matrix
#   bash tests/equivalence.sh --quick               # most strategies once
#   bash tests/equivalence.sh --only 'pp-2.*fp32'   # the cases with such a name
#   bash tests/equivalence.sh --jobs 12             # on GPUs, with 16 cores or more
#   CUDA_VISIBLE_DEVICES= bash tests/equivalence.sh # on the CPU of a machine with a GPU
set -euo pipefail
# shellcheck source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

usage() {
  cat <<'USAGE'
usage: bash tests/equivalence.sh [flags...]

  --quick            a slice: most strategies once
  --only REGEX       the cases whose name matches, as in the table's JSON
  --compile          only those with packed rows, their layers and loss compiled; on a CPU ten seconds and more each
  --jobs N           process groups at a time (default: 1); those of one rank are spread over the GPUs, of those of
                     several ranks two share a GPU at most. Each rank takes a core
  --ranks_per_gpu N  ranks of a process group that share a GPU (default: 1), each waiting for its turn; more than one take
                     NCCL 2.30 or newer, and some 40 ms an all-reduce of four
  --train_file FILE  train on this text, a token a byte (default: LICENSE); 7 kB are enough
  --output PATH      a folder, which gets equivalence.md and equivalence.json, or the name of the .md file
                     (default: outputs/equivalence)

SKIP_SETUP=1 makes no .venv and uses PYTHON as it is.
USAGE
}

help_if_asked "$@"
choose_python
bash "$launcher_dir/setup.sh"
# The modules are found from the project's folder; the user's relative paths from his own.
export PYTHONPATH="$launcher_dir${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m benchmarks.equivalence "$@"
