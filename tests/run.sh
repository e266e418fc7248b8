#!/usr/bin/env bash
# Makes the environment with the development tools and runs the tests. Arguments go to pytest.
#
# Hardware: two CPU cores, no GPU, no network but a package index the first time.
# Time: under 10 minutes, two files of tests at a time; the first call makes .venv (1 to 8 minutes more).
#
#   bash tests/run.sh                              # all that needs no GPU but the long ones
#   bash tests/run.sh tests/test_launchers.py -x
#   bash tests/run.sh -m long                      # what CI runs as well, half a minute to four each
#   bash tests/run.sh -m gpu -n 0                  # on a machine with an NVIDIA GPU, one test at a time
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch.sh
source ./launch.sh

bash setup.sh --dev
choose_python
exec "$python" -m pytest -n 2 --dist loadfile "$@"
