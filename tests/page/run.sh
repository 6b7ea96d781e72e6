#!/usr/bin/env bash
# The live page of a real server in a headless Chromium.
#
#   tests/page/run.sh BINARY [--screenshots DIR]
#
# CHROMIUM names the browser, PYTHON the interpreter (3.9 or newer, nothing installed). Without a browser, Debian's is unpacked into a
# temporary folder; where that cannot be had, the exit status is 77: skipped.
set -euo pipefail
here=$(dirname "$0")
. "$here/../debian.sh"
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

find_browser() {
    local name
    for name in ${CHROMIUM:-chromium chromium-browser google-chrome}; do
        command -v "$name" && return
    done
    return 1
}

# Debian's browser, with its libraries and a font, as a script that finds them in $work. What is installed already is not unpacked again.
unpack_browser() {
    debian "$work" chromium fonts-dejavu-core || return 1
    cat >"$work/fonts.conf" <<END
<fontconfig><dir>$work/tree/usr/share/fonts</dir><dir>/usr/share/fonts</dir><cachedir>$work/fonts</cachedir></fontconfig>
END
    cat >"$work/chromium" <<END
#!/bin/sh
export FONTCONFIG_FILE=$work/fonts.conf LD_LIBRARY_PATH=$(find "$work/tree" '(' -name '*.so' -o -name '*.so.*' ')' -printf '%h\n' | sort -u | paste -sd:)
exec $work/tree/usr/lib/chromium/chromium "\$@"
END
    chmod +x "$work/chromium"
    "$work/chromium" --version >>"$work/apt.log" 2>&1
}

[ $# -ge 1 ] || { echo "usage: tests/page/run.sh BINARY [--screenshots DIR]" >&2; exit 2; }
command -v "$python" >/dev/null || { echo "skipped: no $python"; exit 77; }
browser=$(find_browser) || {
    browser=$work/chromium
    unpack_browser || { tail -n 5 "$work/apt.log" >&2 || true; echo "skipped: no Chromium, and Debian's cannot be had here; CHROMIUM names one"; exit 77; }
}
"$python" "$here/check.py" --browser "$browser" --binary "$@"
