"""The engine without a server: beside the bare backbone, other systems, and about shared documents."""
