#!/bin/sh
# Fifty publishes and rollbacks under 32 clients, in release: what tests/it/generations.rs checks, and besides that nobody waits longer
# than a second for a message. For a machine that does nothing else.
set -eu
cd "$(dirname "$0")/../.."
HARDMAX_TEST_LONGEST_GAP=${1:-1.0} cargo test --release --locked --test it -- --exact --nocapture \
    generations::fifty_publishes_and_rollbacks_under_load
