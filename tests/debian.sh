# shellcheck shell=bash
# Sourced by tests that need a program of Debian's. Its packages are unpacked into a folder: nothing is installed, nothing of the machine is
# changed, and no privileges are needed.

# The packages in FOLDER/tree, with whatever they need that is not installed; with --alone without that. Fails where they cannot be had:
# FOLDER/apt.log says why.
debian() { # FOLDER [--alone] PACKAGE...
    local folder=$1 get=(install --download-only --yes --no-install-recommends) package
    shift
    if [ "$1" = --alone ]; then get=(download) && shift; fi
    command -v apt-get >/dev/null && command -v dpkg >/dev/null || return 1
    mkdir -p "$folder/lists/partial" "$folder/archives/partial" "$folder/tree"
    # Lists of its own: those of the machine may be old, and an image has none.
    local apt=(
        apt-get -qq -o Dir::State::lists="$folder/lists" -o Dir::Cache="$folder" -o Dir::Cache::archives="$folder/archives"
        -o Debug::NoLocking=1 -o APT::Sandbox::User=root
    )
    { "${apt[@]}" update && (cd "$folder/archives" && "${apt[@]}" "${get[@]}" "$@"); } >"$folder/apt.log" 2>&1 || return 1
    for package in "$folder"/archives/*.deb; do
        dpkg -x "$package" "$folder/tree" || return 1
    done
    rm -rf "$folder/lists" "$folder/archives"
}
