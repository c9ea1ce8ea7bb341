#!/usr/bin/env bash
# Build the image with buildah, and with --try start the server and a driver in two containers and watch them work.
#
#   deploy/build.sh [--bootstrap] [--try] [--tag NAME]
#
# --bootstrap  for machines without an image registry: the base image is made of Debian's packages (mmdebstrap), and pip's
#              packages are fetched outside the build and handed in.
# --try        run it: health, a driver's work, SIGTERM. Needs podman and runc.
#
# Everything is kept under STORAGE (default: a new directory under the temporary one, removed at the end unless KEEP=1).
set -euo pipefail
cd "$(dirname "$0")/.."

bootstrap=0 try=0 tag=mmubus
while [ $# -gt 0 ]; do
  case $1 in
    --bootstrap) bootstrap=1 ;;
    --try) try=1 ;;
    --tag) tag=$2; shift ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
  shift
done
for tool in buildah $([ $bootstrap = 0 ] || echo mmdebstrap) $([ $try = 0 ] || echo podman runc); do
  command -v "$tool" >/dev/null || { echo "build.sh: $tool is not installed (Debian's package of that name)" >&2; exit 3; }
done

made=0
if [ -z "${STORAGE:-}" ]; then STORAGE=$(mktemp -d -t mmubus-image-XXXXXX); made=1; fi
mkdir -p "$STORAGE"/{root,run,wheels}

# Limits that work without CAP_SYS_RESOURCE.
cat >"$STORAGE/containers.conf" <<CONF
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
CONF
export CONTAINERS_CONF="$STORAGE/containers.conf"
store=(--root "$STORAGE/root" --runroot "$STORAGE/run" --storage-driver "${STORAGE_DRIVER:-overlay}")

finish() {
  [ $try = 0 ] || podman "${store[@]}" rm --all --force --time 2 >/dev/null 2>&1 || true
  if [ $made = 1 ] && [ -z "${KEEP:-}" ]; then
    buildah "${store[@]}" rm --all >/dev/null 2>&1 || true
    umount "$STORAGE/root/overlay" 2>/dev/null || true
    rm -rf "$STORAGE"
  fi
}
trap finish EXIT

arguments=()
if [ $bootstrap = 1 ]; then
  echo "build.sh: base image of Debian's packages"
  mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates,tini bookworm "$STORAGE/base.tar"
  container=$(buildah "${store[@]}" from scratch)
  buildah "${store[@]}" add --quiet "$container" "$STORAGE/base.tar" / >/dev/null
  buildah "${store[@]}" commit --quiet --rm "$container" mmubus-base >/dev/null
  rm "$STORAGE/base.tar"
  echo "build.sh: pip's packages"
  for file in deploy/constraints.txt build-constraints.txt; do
    "${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --only-binary :all: --python-version 3.11 \
      --require-hashes --no-deps --dest "$STORAGE/wheels" --requirement "$file"
  done
  arguments=(--build-arg BASE=localhost/mmubus-base --volume "$STORAGE/wheels:/wheels:ro"
    --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/wheels)
fi
echo "build.sh: image $tag"
buildah "${store[@]}" bud --quiet --isolation chroot --format docker --file deploy/Containerfile --tag "$tag" "${arguments[@]}" . >/dev/null
podman "${store[@]}" images --format '{{.Repository}}:{{.Tag}} {{.Size}}' 2>/dev/null | grep "/$tag:" || true
[ $try = 1 ] || exit 0

# The same as compose.yaml, by hand, so that podman alone is enough.
# Without systemd podman can't schedule health checks and says so; the image's own check is run by hand below.
podman() { command podman --log-level fatal "$@"; }
options=(--network none --read-only --tmpfs /tmp --cap-drop all --security-opt no-new-privileges --memory 512m
  --volume "mmubus-try:/run/mmubus")
podman "${store[@]}" volume create mmubus-try >/dev/null
podman "${store[@]}" run --detach --name server "${options[@]}" "$tag" >/dev/null
for _ in $(seq 50); do podman "${store[@]}" healthcheck run server >/dev/null 2>&1 && break; sleep 0.2; done
podman "${store[@]}" healthcheck run server && echo "build.sh: the image's health check says that the server serves"
echo "build.sh: the driver, in a container of its own:"
podman "${store[@]}" run --rm --name driver "${options[@]}" "$tag" python /opt/mmubus/examples/driver.py
start=$(date +%s%N)
podman "${store[@]}" stop --time 10 server >/dev/null
echo "build.sh: the server stopped $((($(date +%s%N) - start) / 1000000)) ms after SIGTERM," \
  "status $(podman "${store[@]}" inspect --format '{{.State.ExitCode}}' server); its log:"
podman "${store[@]}" logs server
