#!/bin/sh
# enter.sh ROOT COMMAND…: becomes COMMAND, with ROOT as its whole system. The mounts are of its own mount namespace, so
# they go with it. Run by `unshare --mount`.
set -eu
root=$1
shift
mount -t proc proc "$root/proc"
mount --bind "$root/etc/cpuinfo" "$root/proc/cpuinfo" # the host's names processors that onnxruntime would believe
mount --rbind /dev "$root/dev"
exec chroot "$root" "$@"
