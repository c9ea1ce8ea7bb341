#!/usr/bin/env bash
# Bring up a server, an application and two drivers in containers, and show them working.
#
#   deploy/up.sh [--bootstrap] [--keep]
#
# --bootstrap  for machines without an image registry: see build.sh; needs podman, podman-compose, runc.
# --keep       leave the server running (docker compose -f deploy/compose.yaml down stops it).
#
# Takes Docker with its compose plugin where an engine answers, else podman with podman-compose.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=deploy/scratch.sh
. deploy/scratch.sh

bootstrap="" keep=""
for argument in "$@"; do
  case $argument in
    --bootstrap) bootstrap=1 ;;
    --keep) keep=1 ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done
# The project's own virtual environment may have podman-compose.
export PATH=$PATH:$PWD/.venv/bin
if [ -z "$bootstrap" ] && docker info >/dev/null 2>&1 && docker compose version >/dev/null 2>&1; then
  engine=docker
  compose() { docker compose --file deploy/compose.yaml "$@"; }
elif command -v podman >/dev/null && command -v podman-compose >/dev/null; then
  engine=podman
  # Without systemd podman can't schedule health checks and says so each time; up.sh runs the image's own check.
  compose() { podman-compose --podman-args="--log-level=fatal" --file deploy/compose.yaml "$@"; }
else
  echo "up.sh: needs an engine that answers: Docker with its compose plugin, or podman with podman-compose" >&2
  exit 3
fi
container() { "$engine" ps --all --quiet --filter "label=com.docker.compose.project=mmubus" \
  --filter "label=com.docker.compose.service=$1"; }

finish() {
  [ -n "$keep" ] || compose down --volumes >/dev/null 2>&1 || true
  [ -z "$bootstrap" ] || scratch_end
}
trap finish EXIT

if [ -n "$bootstrap" ]; then
  scratch_begin
  deploy/build.sh --bootstrap
else
  compose build
fi
compose up --no-build --detach

echo "up.sh: waiting for the application"
status=$("$engine" wait "$(container application)")
for driver in hmm rdma; do "$engine" wait "$(container $driver)" >/dev/null; done
for service in application hmm rdma server; do
  echo "--- $service"
  "$engine" logs "$(container "$service")" 2>&1
done
echo "--- what the server has counted"
"$engine" exec "$(container server)" mmubus stats
if [ "$engine" = podman ]; then
  podman healthcheck run "$(container server)" >/dev/null && echo "up.sh: the server is healthy"
fi
if [ -z "$keep" ]; then
  begin=$(date +%s%N)
  "$engine" stop --time 10 "$(container server)" >/dev/null 2>&1
  echo "up.sh: the server stopped $((($(date +%s%N) - begin) / 1000000)) ms after SIGTERM," \
    "status $("$engine" inspect --format '{{.State.ExitCode}}' "$(container server)")"
fi
[ "$status" = 0 ] && echo "up.sh: the application ended with status 0"
exit "$status"
