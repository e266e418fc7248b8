#!/usr/bin/env bash
# Makes the environment with the development tools and runs the tests. Arguments go to pytest.
#
# Hardware: two CPU cores, no GPU, no network but a package index the first time.
# Time: about 15 minutes; the first call makes .venv (1 to 8 minutes more).
#
#   bash tests/run.sh                              # all that needs no GPU
#   bash tests/run.sh tests/test_launchers.py -x
#   bash tests/run.sh -m gpu                       # on a machine with an NVIDIA GPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch.sh
source ./launch.sh

bash setup.sh --dev
choose_python
exec "$python" -m pytest "$@"
