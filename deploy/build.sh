#!/usr/bin/env bash
# Build the image with buildah.
#
#   deploy/build.sh [--bootstrap] [--tag NAME]
#
# --bootstrap  for machines without an image registry: the base image is made of Debian's packages (mmdebstrap, as root), and
#              pip's packages are fetched outside the build and handed in. Everything is kept under STORAGE; without that variable
#              it is only a trial, and goes at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=deploy/scratch.sh
. deploy/scratch.sh

bootstrap="" tag=mmubus
while [ $# -gt 0 ]; do
  case $1 in
    --bootstrap) bootstrap=1 ;;
    --tag) tag=$2; shift ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
  shift
done
for tool in buildah ${bootstrap:+mmdebstrap}; do
  command -v "$tool" >/dev/null || { echo "build.sh: $tool is not installed (Debian's package of that name)" >&2; exit 3; }
done

arguments=(--build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)")
if [ -n "$bootstrap" ]; then
  scratch_begin
  trap scratch_end EXIT
  if ! buildah inspect --type image mmubus-base >/dev/null 2>&1; then
    echo "build.sh: base image of Debian's packages"
    mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates,tini bookworm "$STORAGE/base.tar"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$STORAGE/base.tar" / >/dev/null
    buildah commit --quiet --rm "$container" mmubus-base >/dev/null
    rm "$STORAGE/base.tar"
  fi
  echo "build.sh: pip's packages"
  for file in deploy/constraints.txt build-constraints.txt; do
    "${PYTHON:-python3}" -m pip download --quiet --quiet --disable-pip-version-check --only-binary :all: --python-version 3.11 \
      --require-hashes --no-deps --dest "$STORAGE/wheels" --requirement "$file"
  done
  arguments+=(--isolation chroot --build-arg BASE=localhost/mmubus-base --volume "$STORAGE/wheels:/wheels:ro"
    --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/wheels)
fi
echo "build.sh: image $tag"
# Docker's format, since OCI's has no health check.
buildah bud --quiet --format docker --file deploy/Containerfile --tag "$tag" "${arguments[@]}" . >/dev/null
buildah images --format '{{.Name}}:{{.Tag}} {{.Size}}' | grep "/$tag:"
