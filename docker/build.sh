#!/usr/bin/env bash
# docker/build.sh PREFIX: installs rlkd in an environment at PREFIX, read-only for everybody.
# Both Dockerfiles run it; `make docker-check` runs it without Docker.
# TORCH_INDEX: a package index to look for torch in, next to the usual one (CPU builds, other versions of CUDA).
set -euo pipefail
cd "$(dirname "$0")/.."
prefix=${1:?usage: docker/build.sh PREFIX}

python3 -m venv "$prefix"
# The constraint is torch's version, the same in both images.
"$prefix/bin/python" -m pip install -c constraints-cpu.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} '.[ctranslate2]'
chmod -R a+rX,a-w "$prefix"
"$prefix/bin/rlkd" --version
