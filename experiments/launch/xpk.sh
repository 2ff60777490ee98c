#!/usr/bin/env bash
# A command of difax on TPU slices of a GKE cluster, through xpk (github.com/AI-Hypercomputer/xpk):
#   CLUSTER=mine TPU_TYPE=v5litepod-16 IMAGE=gcr.io/me/difax experiments/launch/xpk.sh \
#     train --config fmnist_dit --workdir /shared/flow
# The image has difax[tpu]; the folder of the run lies on storage that all hosts mount. GKE tells each of them its
# number and the others' names, and starts the job again where a host fails: the same command goes on.
set -euo pipefail

: "${CLUSTER:?name of the GKE cluster}" "${TPU_TYPE:?such as v5litepod-16}" "${IMAGE:?an image with difax[tpu]}"
name="${NAME:-difax-$(date +%m%d-%H%M)}"

more=()
if [ "${1:-}" = train ]; then
  more=(--resume auto)
fi

xpk workload create \
  --cluster "$CLUSTER" \
  --workload "$name" \
  --tpu-type "$TPU_TYPE" \
  --num-slices "${SLICES:-1}" \
  --docker-image "$IMAGE" \
  --max-restarts "${RESTARTS:-5}" \
  --env "DIFAX_JOB=$name" \
  --command "$(printf '%q ' difax "$@" "${more[@]}")"
