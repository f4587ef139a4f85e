# For the demonstrations: a guest that goes through steps, and a host that shows its side after each.
#
# A demonstration sets `titles` (a title for each step) and defines `show_host`. Its guest says BEGIN NAME,
# SAYS TEXT and STEP NAME on the port for steps, and waits for a line after STEP.
# shellcheck shell=bash
# shellcheck source=tests/guest/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../tests/guest/lib.sh"

bold='' dim='' green='' plain=''
if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' plain=$'\e[0m'; fi

declare -A titles

# Installs and builds what is needed.
prepare() {
    "$repository/tests/guest/install"
    cargo build --release --quiet --manifest-path "$repository/Cargo.toml"
    make_work
}

# play: boots a guest on the disks that are served, and shows both sides until it is off.
play() {
    boot
    local message name
    while next_message; do
        case $message in
            'BEGIN '*)
                name=${message#BEGIN }
                printf '\n%s%s%s\n' "$bold" "${titles[$name]:-$name}" "$plain"
                ;;
            'SAYS '*) printf '  %sguest%s  %s\n' "$green" "$plain" "${message#SAYS }" ;;
            'STEP '*)
                show_host
                echo go on >&4
                ;;
        esac
    done
    wait "$guest_process" || fail "the guest failed: $(cat "$work/output")"
    stop_thinlun
}

# The guest's next line; none when the guest is gone.
next_message() {
    until IFS= read -r -t 1 message <&3; do
        kill -0 "$guest_process" 2>/dev/null || return 1
    done
}

# The guest's port for steps: what it writes comes out of steps.out, what it reads goes into steps.in.
boot() {
    mkfifo "$work/steps.in" "$work/steps.out"
    exec 3<>"$work/steps.out" 4<>"$work/steps.in"
    printf '\n%sbooting a guest ...%s\n' "$dim" "$plain"
    start_guest --steps "$work/steps" "$(guest_script)" >"$work/output" 2>&1
}

# show_image IMAGE [NAME]: what the host has of an image.
show_image() {
    # Data that only the page cache has shows as no extent yet.
    sync "$1"
    printf '  %shost%s   %s%s of %s are allocated, in %s\n' "$green" "$plain" "${2:+$2: }" \
        "$(readable "$(($(stat -c %b "$1") * 512))")" "$(readable "$(stat -c %s "$1")")" \
        "$(extents "$1")"
    "$thinlun" map --width 72 "$1" | sed -n 's/^[#%+.]\{2,\}$/         &/p'
}

readable() { numfmt --to=iec-i --suffix=B --format=%.1f "$1"; }

# What filefrag says of a file's extents, in a few words.
extents() {
    filefrag -v "$1" | awk '
        /^ +[0-9]+:/ { count++; split($0, field, ":"); size = field[4] + 0; if (size > largest) largest = size }
        /unwritten/ { unwritten++ }
        /shared/ { shared++ }
        END {
            printf "%d extents", count
            if (count) printf ", the largest of %.1f MiB", largest * 4 / 1024
            if (unwritten) printf ", %d unwritten", unwritten
            if (shared) printf ", %d shared", shared
        }'
}
