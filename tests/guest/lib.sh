# Shared by the installer, the rig, the cases and the demo: where things are, and the daemon's life.
# shellcheck shell=bash

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck disable=SC2034
cache=${THINLUN_CACHE:-$repository/target/guest}
thinlun=${THINLUN:-$repository/target/release/thinlun}
rig=$repository/tests/guest/rig
# shellcheck disable=SC2034
qemus=(7.2 10)

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "FAILED: $*"
    exit 1
}

# A directory that goes with the script, and whatever the script started: the daemon, and the
# processes that it lists in `started`.
work=
daemon=
started=()
make_work() {
    work=$(mktemp -d "${TMPDIR:-/tmp}/thinlun.XXXXXX")
    trap 'clean_up $?' EXIT
    trap 'exit 130' INT TERM
}

clean_up() {
    local status=$1
    for process in "${started[@]}"; do
        kill "$process" 2>/dev/null || true
    done
    stop_thinlun || true
    if [ "$status" -ne 0 ] && [ -s "$work/thinlun.log" ]; then
        say "--- the daemon's log:"
        tail -n 40 "$work/thinlun.log" >&2
    fi
    rm -rf "$work"
    exit "$status"
}

# start_thinlun ARGS...: serves disks on $socket.
socket=
start_thinlun() {
    socket=$work/socket
    "$thinlun" --socket-path "$socket" "$@" >>"$work/thinlun.log" 2>&1 &
    daemon=$!
    local tries=0
    until [ -S "$socket" ]; do
        kill -0 "$daemon" 2>/dev/null || fail "thinlun did not start: $(cat "$work/thinlun.log")"
        tries=$((tries + 1))
        [ "$tries" -lt 200 ] || fail "thinlun made no socket"
        sleep 0.05
    done
}

# Ends the daemon as a service manager would; it must end cleanly and soon.
stop_thinlun() {
    [ -n "$daemon" ] || return 0
    local pid=$daemon status=0
    daemon=
    kill -TERM "$pid" 2>/dev/null || true
    wait "$pid" || status=$?
    [ "$status" -eq 0 ] || { say "thinlun ended with status $status"; return 1; }
    [ ! -e "$socket" ] || { say "thinlun left its socket behind"; return 1; }
}

# guest [RIG OPTIONS] SCRIPT [ARGS...]: boots a guest on the daemon's disks.
guest() { "$rig" --socket "$socket" "$@"; }

# start_guest: the same in the background, with the rig's process in $guest_process.
guest_process=
start_guest() {
    "$rig" --socket "$socket" "$@" &
    guest_process=$!
    started+=("$guest_process")
}

# The in-guest script that belongs to the case that is running.
guest_script() { printf '%s.guest' "${BASH_SOURCE[-1]}"; }
