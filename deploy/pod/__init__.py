"""`make pod`: overlay cpu's pod on this machine, played by podman from the image of `make image`, and checked."""
