"""`python -m server.probe`: a container's health check. Exit status 0 means that the server is serving."""

import argparse
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """0 if the service is SERVING, 1 if it is not or cannot be reached."""
    host = os.environ.get("MTLORA_HOST", "").strip("[]")
    # A server that listens on all addresses is reachable on this one.
    host = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
    port = os.environ.get("MTLORA_HEALTH_PORT") or os.environ.get("MTLORA_PORT") or 50051
    default = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    parser = argparse.ArgumentParser(prog="python -m server.probe", description=__doc__)
    parser.add_argument("service", nargs="?", default="live", help='"live", or "mtlora.v1.Inference" for readiness')
    parser.add_argument("--address", default=default, metavar="HOST:PORT", help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=3.0, metavar="SECONDS")
    options = parser.parse_args(argv)
    import grpc

    try:
        status = health(options.address, options.service, options.timeout)
    except grpc.RpcError as error:
        print(f"{options.address}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    print(f"{options.address}: {options.service}: {status}")
    return int(status != "SERVING")


def health(address: str, service: str, timeout: float) -> str:
    """The service's status by name, asked in plain text. Raises grpc.RpcError."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


if __name__ == "__main__":
    raise SystemExit(main())
