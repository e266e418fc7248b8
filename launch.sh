# shellcheck shell=bash
# What the launchers share: arguments, GPU detection, and one supervised torchrun. Sourced, never run.

# Folder of the launchers as the caller wrote it. We never cd: a relative path on the command line stays the user's.
launcher_dir=$(dirname "${BASH_SOURCE[0]}")

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Prints the caller's usage and ends, where one of the arguments asks for it.
help_if_asked() {
  local argument
  for argument in "$@"; do
    if [[ $argument == -h || $argument == --help ]]; then
      usage
      exit 0
    fi
  done
}

is_count() {
  [[ $1 =~ ^[1-9][0-9]*$ ]]
}

is_number() {
  [[ $1 =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)$ ]]
}

# True where torch would see an NVIDIA GPU, without the seconds that importing torch takes.
has_gpu() {
  # Set but empty, -1 and a scheduler's "NoDevFiles" all mean none.
  [[ ${CUDA_VISIBLE_DEVICES-0} =~ ^([0-9]|GPU-|MIG-) ]] || return 1
  if command -v nvidia-smi >/dev/null; then
    [[ $(nvidia-smi -L 2>/dev/null) == *"GPU "* ]]
  else
    [[ -e /dev/nvidia0 ]]
  fi
}

# True where one of the flags names the model, which a rehearsal would give random weights.
names_model() {
  [[ " $*" == *" --model_name_or_path"* ]]
}

# Splits "[batch-size-per-gpu] [mem-cap-GB] [model] [gpu-num] [flags...]" into batch_size, mem_cap, model,
# num_processes and the array flags. Without a GPU, a positional argument and a model among the flags it takes a rehearsal
# instead, sized to end in about a minute on two CPU cores.
parse_arguments() {
  local default_model=$1
  shift
  local -a given=()
  while [[ $# -gt 0 && $1 != --* ]]; do
    given+=("$1")
    shift
  done
  flags=("$@")
  if [[ ${#given[@]} -eq 0 ]] && ! names_model "$@" && ! has_gpu; then
    rehearse
    return
  fi
  batch_size=${given[0]-16}
  mem_cap=${given[1]-0}
  model=${given[2]-$default_model}
  num_processes=${given[3]-1}
  is_count "$batch_size" || die "batch-size-per-gpu (argument 1): got '$batch_size', needs a whole number from 1"
  is_number "$mem_cap" || die "mem-cap-GB (argument 2): got '$mem_cap', needs a number; 0 is no cap"
  [[ $model =~ ^[^-] ]] || die "model (argument 3): got '$model', needs a size like 125m, a folder or a hub id"
  is_count "$num_processes" || die "gpu-num (argument 4): got '$num_processes', needs a whole number from 1"
  [[ ${#given[@]} -le 4 ]] || die "argument 5: got '${given[4]}', but after gpu-num only flags (--...) may follow"
}

rehearse() {
  batch_size=4 mem_cap=0 model=tiny num_processes=1
  # bash before 4.4 takes an empty "${flags[@]}" for an unset variable.
  flags=(--from_scratch --block_size 128 --max_train_steps 40 --max_eval_samples 32 ${flags[@]+"${flags[@]}"})
  echo "No GPU and no size given: rehearsing with the 'tiny' model for about a minute (-h shows the arguments)." >&2
}

# Sets python, the interpreter that training runs in.
choose_python() {
  if [[ ${SKIP_SETUP:-} == 1 ]]; then
    python=${PYTHON:-python3}
  else
    python=$launcher_dir/.venv/bin/python
  fi
}

# Sets the array torchrun: the program, and where the other machines are.
choose_torchrun() {
  local num_nodes=${NNODES:-1}
  if [[ -z ${TORCHRUN:-} ]]; then
    torchrun=("$python" -m torch.distributed.run)
  elif [[ -x $TORCHRUN ]]; then
    torchrun=("$TORCHRUN")
  else
    read -r -a torchrun <<<"$TORCHRUN"
  fi
  is_count "$num_nodes" || die "NNODES: got '$num_nodes', needs a whole number from 1"
  if [[ $num_nodes == 1 ]]; then
    torchrun+=(--standalone)
  elif [[ -n ${RDZV_ENDPOINT:-} ]]; then
    torchrun+=(--nnodes "$num_nodes" --rdzv_backend c10d --rdzv_id "${RDZV_ID:-clm}" --rdzv_endpoint "$RDZV_ENDPOINT")
    # Ranks that are started again would meet in a store that knows the old ones, and machines count restarts each
    # for itself (pytorch issue 135712): a new store each time. Rank 0 holds it, and is itself no longer named by the
    # watchdog when it is stopped.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  else
    add_static_rendezvous "$num_nodes"
  fi
  torchrun+=(--nproc_per_node "$num_processes")
  if [[ -n ${MAX_RESTARTS:-} ]]; then
    [[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || die "MAX_RESTARTS: got '$MAX_RESTARTS', needs a whole number; 0: no restart"
    torchrun+=(--max_restarts "$MAX_RESTARTS")
  fi
}

add_static_rendezvous() {
  [[ -n ${MASTER_ADDR:-} && ${NODE_RANK:-} =~ ^[0-9]+$ ]] ||
    die "NNODES=$1 needs MASTER_ADDR (a host name) and NODE_RANK (0 to $(($1 - 1))), or RDZV_ENDPOINT=host:port"
  ((NODE_RANK < $1)) || die "NODE_RANK=$NODE_RANK: NNODES=$1 has ranks 0 to $(($1 - 1))"
  torchrun+=(--nnodes "$1" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
}

# Threads of each process. torchrun's own default, with a warning, is 1.
share_cores() {
  local num_cores
  num_cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  echo $((num_cores > num_processes ? num_cores / num_processes : 1))
}

# Runs a torchrun command and returns the training's own exit code.
#
# torchrun turns every failure into 1 under a page of its own traceback, so a run that ends in order writes its code
# into CLM_EXIT_CODE_FILE and tells torchrun 0.
#
# A first SIGINT, SIGTERM or SIGUSR1 goes to the ranks alone, which save a checkpoint and end; torchrun would give them 30 s
# and print a traceback. Torchrun itself gets the second one, and a first one that comes before it has ranks. It ignores
# SIGUSR1, of which it would die: Slurm sends that to every process of a step.
run_supervised() {
  local child status interrupted=1 signalled=
  CLM_EXIT_CODE_FILE=$(mktemp)
  export CLM_EXIT_CODE_FILE
  trap 'rm -f "$CLM_EXIT_CODE_FILE" "$CLM_EXIT_CODE_FILE".*' EXIT
  # Job control gives torchrun a process group of its own: Ctrl-C reaches us alone, and is passed on once.
  set -m
  trap '' USR1
  "$@" </dev/null &
  child=$!
  set +m
  trap 'pass_on INT 130' INT
  trap 'pass_on TERM 143' TERM HUP
  trap 'pass_on USR1 138' USR1
  while [[ -n $interrupted ]]; do
    interrupted=
    status=0
    wait "$child" 2>/dev/null || status=$?
  done
  if [[ -s $CLM_EXIT_CODE_FILE ]]; then
    status=$(<"$CLM_EXIT_CODE_FILE")
  elif [[ $status -ne 0 && -n $signalled ]]; then
    status=$signalled
  fi
  return "$status"
}

pass_on() {
  local signal=$1 ranks=
  interrupted=1
  if [[ -z $signalled ]]; then
    ranks=$(pgrep -P "$child" 2>/dev/null || cat "/proc/$child/task/$child/children" 2>/dev/null) || true
    [[ -n $ranks ]] || signal=TERM # while Python starts, SIGINT means a traceback
  fi
  signalled=$2
  # shellcheck disable=SC2086 # a list of process ids
  kill -s "$signal" ${ranks:-$child} 2>/dev/null || true
}
