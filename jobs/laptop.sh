#!/usr/bin/env bash
# What: the tour jobs/train.py, four workers and the root, records in runs/.
# Where: a laptop or workstation, after `make venv`; two cores are enough.
# How long: under a minute.
set -euo pipefail
cd "$(dirname "$0")/.."

out=runs/laptop-$(date +%Y%m%d-%H%M%S)
.venv/bin/mpisync run -n 5 jobs/train.py --out "$out" "$@"
echo "records and the averaged model: $out"
