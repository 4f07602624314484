#!/bin/sh
# Uninstall what only training, load tests and development need: drop_extras.sh DEVICE, in the repository's root.
set -eu
names() { grep -oE '^[a-zA-Z0-9._-]+' "$1" | sort -u; }
names "requirements/$1.lock" > /tmp/all
names "requirements/$1-server.txt" > /tmp/server
comm -23 /tmp/all /tmp/server | xargs .venv/bin/python -m pip uninstall -q -y
rm /tmp/all /tmp/server
