#!/usr/bin/env bash
# Makes .venv beside this file and installs the requirements into it. Every launcher calls it first.
#
# Hardware: any Linux machine with Python 3.10 or newer. No compiler, no nvcc, no GPU.
# Time: 1 to 8 minutes, as the package index is fast; 1.7 GB with a CPU build of torch, 5.4 GB with the CUDA build.
#       Nothing when it is up to date.
#
#   bash setup.sh                     # make or refresh .venv
#   bash setup.sh --dev               # and the tools of `make check` and the tests
#   PYTHON=python3.12 bash setup.sh   # choose the interpreter that .venv is made of
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'USAGE'
usage: bash setup.sh [--dev]

Makes .venv and installs the requirements into it. Up to date: does nothing. Interrupted: call it again.

  --dev          also install requirements-dev.txt

  PYTHON=...     interpreter that .venv is made of, 3.10 or newer (default: python3)
  SKIP_SETUP=1   make nothing: the launchers use PYTHON (default: python3) as it is
USAGE
}

readonly venv=.venv
readonly log=.setup.log
readonly lock=.setup.lock

fail() {
  printf 'setup.sh: %s\n' "$*" >&2
  exit 1
}

# A stamp holds the checksum of the files that were installed; it is written last, so an interrupted install has none.
checksum() {
  cat "$@" | cksum
}

is_fresh() {
  local stamp=$venv/.stamp-$1
  shift
  [[ -x $venv/bin/python && -f $stamp ]] && [[ $(<"$stamp") == "$(checksum "$@")" ]]
}

check_python() {
  command -v "$1" >/dev/null || fail "$1 not found: install Python 3.10 or newer, or name one with PYTHON="
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$1 is $("$1" --version 2>&1 | tail -n 1), 3.10 or newer is needed: name one with PYTHON="
  "$1" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$1 cannot make environments: apt-get install python3-venv, or name another interpreter with PYTHON="
}

make_venv() {
  local python=${PYTHON:-python3}
  check_python "$python"
  "$python" -m venv --clear "$venv" >"$log" 2>&1 || fail_with_log "could not make $venv with $python"
}

fail_with_log() {
  tail -n 15 "$log" >&2
  fail "$1 (the whole log: $PWD/$log). Call it again to go on where it stopped."
}

install() {
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-user "$@" >>"$log" 2>&1 ||
    fail_with_log "pip install $* failed"
}

install_base() {
  echo "Installing torch, transformers and ColossalAI into $PWD/$venv: 1 to 8 minutes (pip's output: $log)"
  install -r requirements.txt
  # BUILD_EXT=1 in the environment would make ColossalAI compile CUDA kernels that ours replace.
  BUILD_EXT=0 install --no-deps --use-pep517 -r requirements-colossalai.txt
  checksum "${base_files[@]}" >"$venv/.stamp-base"
}

install_dev() {
  echo "Installing the development tools into $PWD/$venv (pip's output: $log)"
  install -r requirements-dev.txt
  checksum "${dev_files[@]}" >"$venv/.stamp-dev"
}

# Two launchers started at once: the second waits here and then finds everything done.
take_lock() {
  command -v flock >/dev/null || return 0
  exec 9>"$lock"
  flock --nonblock 9 && return
  echo "Waiting for another setup.sh in $PWD"
  flock 9
}

dev=
case "${1:-}" in
"") ;;
--dev) dev=1 ;;
-h | --help) usage && exit ;;
*) usage >&2 && exit 2 ;;
esac
[[ ${SKIP_SETUP:-} == 1 ]] && exit

readonly base_files=(requirements.txt requirements-colossalai.txt)
readonly dev_files=("${base_files[@]}" requirements-dev.txt)

is_done() {
  is_fresh base "${base_files[@]}" && { [[ -z $dev ]] || is_fresh dev "${dev_files[@]}"; }
}

if is_done; then
  [[ -z ${PYTHON:-} || $(command -v "$PYTHON") -ef $venv/bin/python ]] ||
    echo "setup.sh: PYTHON=$PYTHON is not used, $venv is there already; remove $venv to make it anew" >&2
  exit
fi
take_lock
is_done && exit

SECONDS=0
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
is_fresh base "${base_files[@]}" || install_base
[[ -z $dev ]] || is_fresh dev "${dev_files[@]}" || install_dev
echo "Set-up done in $SECONDS s"
