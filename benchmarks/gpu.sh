#!/usr/bin/env bash
# Speed of ddpm-cifar10 on this machine's GPU, in at most 8 minutes: prints a table, writes benchmarks/gpu.json. docs/gpu.md explains it.
#
#   make setup && benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
exec timeout --kill-after=5 480 "${PYTHON:-.venv/bin/python}" -m benchmarks.gpu "$@"
