#!/usr/bin/env bash
# accelerate 1.15.0: Accelerator(cpu=True) in a process that Open MPI's mpirun started takes the launcher's variables
# for a wish to use torch.distributed, and raises, since the variables that torch wants are not set. A script that only
# wants one process' share of a job of another library (MPI, Horovod) must hide OMPI_COMM_WORLD_SIZE and its like, or
# never reaches its first line of training; transformers' Trainer makes an Accelerator, so it inherits this.
# Expected output:  alone: 1 process; under mpirun's variables: ValueError MASTER_ADDR
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy accelerate==1.15.0
cat > "$folder/one.py" <<'PYTHON'
from accelerate import Accelerator

try:
    print(f"{Accelerator(cpu=True).num_processes} process")
except ValueError as error:
    print("ValueError", "MASTER_ADDR" if "MASTER_ADDR" in str(error) else error)
PYTHON
alone=$("$folder/venv/bin/python" "$folder/one.py")
launched=$(OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=2 \
  "$folder/venv/bin/python" "$folder/one.py")
echo "alone: $alone; under mpirun's variables: $launched"
[[ $alone == "1 process" && $launched == "ValueError MASTER_ADDR" ]] || { echo "this has changed" >&2; exit 1; }
