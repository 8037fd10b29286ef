#!/bin/bash
# user_manager.sh CGROUP2 COMMAND…: runs COMMAND beside a real systemd user manager of root's, which lingers, in cgroup,
# mount and pid namespaces of their own. All of it ends when this process is killed.
set -e
cgroup=$1/surgvqa-test-$$
shift
mkdir "$cgroup"
echo $$ > "$cgroup/cgroup.procs"
exec unshare --mount --pid --fork --cgroup --mount-proc --kill-child bash -c '
  set -e
  mount --make-rprivate /
  umount -R /sys/fs/cgroup
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
  mount -t tmpfs tmpfs /run/systemd
  mkdir /run/systemd/system                                  # "booted with systemd"
  mkdir -p /run/user/0 /var/lib/systemd
  mount -t tmpfs -o mode=700 tmpfs /run/user/0
  mount -t tmpfs tmpfs /var/lib/systemd
  mkdir /var/lib/systemd/linger
  touch /var/lib/systemd/linger/root
  XDG_RUNTIME_DIR=/run/user/0 SYSTEMD_LOG_TARGET=console /lib/systemd/systemd --user &
  echo $! > /run/user/0/manager.pid
  for i in $(seq 200); do [ -S /run/user/0/systemd/private ] && break; sleep 0.05; done
  "$@" &
  wait $!
' bash "$@"
