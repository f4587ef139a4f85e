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

# The sysfs directory of a LUN, its block device, and its generic device; `generic LUN 1` is the same LUN on the second
# controller.
lun() { echo /sys/class/scsi_device/"${2:-0}":*:"$1"/device; }
disk() { echo "/dev/$(ls "$(lun "$@")/block")"; }
generic() { echo "/dev/$(ls "$(lun "$@")/scsi_generic")"; }

# queue LUN ATTRIBUTE: what the kernel's block layer made of the disk.
queue() { cat "/sys/block/$(basename "$(disk "$1")")/queue/$2"; }

# bytes HEX...: those bytes.
bytes() { for byte in "$@"; do printf "\\x$byte"; done; }

# number WIDTH N: a big-endian number of so many bytes, as bytes in hex.
number() { printf "%0$((2 * $1))x" "$2" | sed 's/../& /g'; }

# token_copy FROM BLOCKS TO LBA: copies the first blocks of a disk by a token (POPULATE TOKEN, RECEIVE ROD
# TOKEN INFORMATION, WRITE USING TOKEN). Debian's ddpt 0.97 cannot: it asks for 256 times as many blocks.
token_copy() {
    # shellcheck disable=SC2046
    bytes 00 1e 00 00 00 00 00 00 00 00 00 00 00 00 00 10 $(number 8 0) $(number 4 "$2") 00 00 00 00 >/tmp/populate
    sg_raw --send=32 --infile=/tmp/populate "$1" 83 10 00 00 00 00 00 00 00 01 00 00 00 20 00 00 2>/dev/null || return
    sg_raw --request=1024 --outfile=/tmp/information "$1" 84 07 00 00 00 01 00 00 00 00 00 00 04 00 00 00 2>/dev/null || return
    {
        bytes 02 26 00 00 00 00 00 00 $(number 8 0)
        tail -c +39 /tmp/information | head -c 512
        # shellcheck disable=SC2046
        bytes 00 00 00 00 00 00 00 10 $(number 8 "$4") $(number 4 "$2") 00 00 00 00
    } >/tmp/write
    sg_raw --send=552 --infile=/tmp/write "$3" 83 11 00 00 00 00 00 00 00 02 00 00 02 28 00 00 2>/dev/null
}

# busybox prefers what it has itself to a program of the same name: these are the full programs.
for tool in blkdiscard blockdev dd fstrim sha256sum stat truncate; do
    eval "$tool() { /bin/$tool \"\$@\"; }"
done
