#!/bin/bash
# One sweep on a Slurm allocation: a Ray head on the first node, workers on the others, the driver next to the head.
#   sbatch --nodes=4 --gpus-per-node=8 deploy/slurm.sh gemma2_2b storage.root=/shared/runs
# Run it from a checkout on a file system that all nodes share, after `make setup` there. If requeued after a preemption,
# it continues where it stopped; SIGINT comes two minutes before the time limit, so that the sweep stops cleanly.
#SBATCH --job-name=deltascope
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:INT@120
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch [options] deploy/slurm.sh CONFIG [KEY=VALUE...]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:?run this with sbatch}"
. .venv/bin/activate

# Anyone who can reach Ray's ports could run code as you, so every node uses this token, which only you can read.
umask 077
token_file="$(mktemp "$PWD/.ray-token.XXXXXX")"
trap 'rm -f "$token_file"; kill $(jobs -p) 2> /dev/null; wait' EXIT
python -c "import secrets; print(secrets.token_hex(32), end='')" > "$token_file"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token_file" RAY_USAGE_STATS_ENABLED=0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
head_ip="$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')"
port="${RAY_PORT:-6379}"
cpus="${SLURM_CPUS_ON_NODE:?}"
gpus="${SLURM_GPUS_ON_NODE:-0}"

srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" \
    ray start --head --block --node-ip-address="$head_ip" --port="$port" --dashboard-host=127.0.0.1 \
    --num-cpus="$cpus" --num-gpus="$gpus" &
until ray health-check --address "$head_ip:$port" > /dev/null 2>&1; do
    kill -0 $! || { echo "the Ray head on $head did not start" >&2; exit 1; }
    sleep 1
done
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 --overlap --nodelist="$node" \
        ray start --block --address="$head_ip:$port" --num-cpus="$cpus" --num-gpus="$gpus" &
done

# The sweep has as many workers as there is room for when it starts, so all nodes must have joined by then.
python - "$head_ip:$port" "${#nodes[@]}" << 'END'
import sys
import time

import ray

address, expected = sys.argv[1], int(sys.argv[2])
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
for _ in range(300):
    alive = sum(node["Alive"] for node in ray.nodes())
    if alive >= expected:
        break
    time.sleep(1)
else:
    print(f"only {alive} of {expected} nodes joined within five minutes; going on with these", flush=True)
END

# Slurm sends the signal to this shell alone (B:): to the job's steps it would stop Ray under the sweep.
python -m jobs sweep "$@" --address "$head_ip:$port" &
driver=$!
trap 'kill -INT "$driver" 2> /dev/null || true' INT
status=0
wait "$driver" || status=$?
while kill -0 "$driver" 2> /dev/null; do # the wait was interrupted by the signal, and the sweep is stopping
    status=0
    wait "$driver" || status=$?
done
exit "$status"
