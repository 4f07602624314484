#!/bin/sh
# Starts the server as the container's first process. The root file system may be read-only: files compiled while the
# image was built move to a writable folder.
set -eu
if [ -d /opt/mtlora/triton ] && [ ! -e "$TRITON_CACHE_DIR" ]; then
  cp -r /opt/mtlora/triton "$TRITON_CACHE_DIR"
fi
exec "$@"
