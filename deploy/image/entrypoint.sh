#!/bin/sh
# Starts the server as the container's first process. The root file system may be read-only: what is compiled while the
# image is built moves to where it can be added to.
set -eu
if [ -d /opt/mtlora/triton ] && [ ! -e "$TRITON_CACHE_DIR" ]; then
  cp -r /opt/mtlora/triton "$TRITON_CACHE_DIR"
fi
exec "$@"
