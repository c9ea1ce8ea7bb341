# shellcheck shell=bash
# Sourced by build.sh and up.sh, for machines without an image registry: buildah and podman keep everything under one directory,
# STORAGE, and need neither systemd nor CAP_SYS_RESOURCE. Without STORAGE it is a temporary one, and goes at the end.

scratch_begin() {
  SCRATCH_OWN=""
  if [ -z "${STORAGE:-}" ]; then STORAGE=$(mktemp -d -t mmubus-image-XXXXXX) SCRATCH_OWN=1; fi
  export STORAGE CONTAINERS_CONF="$STORAGE/containers.conf" CONTAINERS_STORAGE_CONF="$STORAGE/storage.conf"
  mkdir -p "$STORAGE"/{root,run,wheels}
  cat >"$CONTAINERS_CONF" <<CONF
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
CONF
  cat >"$CONTAINERS_STORAGE_CONF" <<CONF
[storage]
driver = "${STORAGE_DRIVER:-overlay}"
graphroot = "$STORAGE/root"
runroot = "$STORAGE/run"
CONF
}

scratch_end() {
  [ -n "${SCRATCH_OWN:-}" ] || return 0
  buildah rm --all >/dev/null 2>&1 || true
  umount "$STORAGE/root/overlay" 2>/dev/null || true
  rm -rf "$STORAGE"
}
