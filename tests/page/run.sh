#!/usr/bin/env bash
# The live page of a real server in a headless Chromium.
#
#   tests/page/run.sh BINARY [--screenshots DIR]
#
# CHROMIUM names the browser, PYTHON the interpreter (3.9 or newer, nothing installed). Without a browser it is taken from Debian's
# packages where that is possible; else the status is 77, which means: skipped.
set -euo pipefail
here=$(dirname "$0")
python=${PYTHON:-python3}

find_browser() {
    local name
    for name in ${CHROMIUM:-chromium chromium-browser google-chrome}; do
        command -v "$name" && return
    done
    return 1
}

install() {
    [ "$(id -u)" = 0 ] && command -v apt-get || return 1
    apt-get install -y --no-install-recommends chromium || { apt-get update && apt-get install -y --no-install-recommends chromium; }
}

[ $# -ge 1 ] || { echo "usage: tests/page/run.sh BINARY [--screenshots DIR]" >&2; exit 2; }
command -v "$python" >/dev/null || { echo "skipped: no $python"; exit 77; }
browser=$(find_browser) || {
    install >/dev/null 2>&1 || { echo "skipped: no Chromium, and it cannot be installed from here; CHROMIUM names one"; exit 77; }
    browser=$(find_browser)
}
exec "$python" "$here/check.py" --browser "$browser" --binary "$@"
