# For the scripts that run in a guest: which disk is which, and how checks are told.
# shellcheck shell=sh

fail() {
    echo "FAILED: $*"
    exit 1
}

# is WHAT WANTED ACTUAL
is() {
    [ "$2" = "$3" ] || fail "$1 is '$3', not '$2'"
    echo "ok: $1 is $2"
}

# refused COMMAND...: the command must fail.
refused() {
    if "$@"; then fail "done, but should be refused: $*"; fi
}

# random MEBIBYTES: that much noise.
random() { head -c $(($1 * 1024 * 1024)) /dev/urandom; }

# The sysfs directory of a LUN, its block device, and its generic device.
lun() { echo /sys/class/scsi_device/*:"$1"/device; }
disk() { echo "/dev/$(ls "$(lun "$1")/block")"; }
generic() { echo "/dev/$(ls "$(lun "$1")/scsi_generic")"; }

# queue LUN ATTRIBUTE: what the kernel's block layer made of the disk.
queue() { cat "/sys/block/$(basename "$(disk "$1")")/queue/$2"; }

# busybox prefers what it has itself to a program of the same name: these are the full programs.
for tool in blkdiscard blockdev dd fstrim sha256sum stat truncate; do
    eval "$tool() { /bin/$tool \"\$@\"; }"
done
