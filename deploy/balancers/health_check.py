"""A gRPC health check as the bytes of a client's HTTP/2 connection, for balancers that send raw bytes.

`python -m deploy.balancers.health_check` prints it in hexadecimal, as `tcp-check send-binary` in haproxy.cfg has it.
"""

from grpc_health.v1 import health_pb2

SERVICE = "mtlora.v1.Inference"
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4
# Indices in HPACK's static table.
_METHOD_POST, _SCHEME_HTTPS, _PATH, _AUTHORITY, _CONTENT_TYPE = 3, 7, 4, 1, 31


def health_check(service: str = SERVICE) -> bytes:
    """A whole connection: preface, settings, and one call of grpc.health.v1.Health/Check."""
    message = health_pb2.HealthCheckRequest(service=service).SerializeToString()
    headers = b"".join(
        (
            bytes((0x80 | _METHOD_POST, 0x80 | _SCHEME_HTTPS)),
            bytes((_PATH,)) + _text("/grpc.health.v1.Health/Check"),
            bytes((_AUTHORITY,)) + _text("health"),
            # An index above 14 does not fit into the first byte.
            bytes((15, _CONTENT_TYPE - 15)) + _text("application/grpc"),
            bytes((0,)) + _text("te") + _text("trailers"),
        )
    )
    body = b"\0" + len(message).to_bytes(4) + message
    return b"".join(
        (
            _PREFACE,
            _frame(_SETTINGS, 0, 0, b""),
            _frame(_HEADERS, _END_HEADERS, 1, headers),
            _frame(_DATA, _END_STREAM, 1, body),
        )
    )


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def _text(text: str) -> bytes:
    return bytes((len(text),)) + text.encode()


if __name__ == "__main__":
    print(health_check().hex())
