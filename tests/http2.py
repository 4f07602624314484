"""HTTP/2 frames, for callers that break a client's rules."""

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
# Flags. ACK is of SETTINGS and PING, END_STREAM of DATA and HEADERS.
ACK = END_STREAM = 1
END_HEADERS = 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# Length, kind, flags and stream.
HEAD_BYTES = 9


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One frame."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def parse(data: bytes) -> tuple[list[tuple[int, int, int, bytes]], bytes]:
    """Kind, flags, stream and payload of every whole frame, and the bytes after them."""
    frames = []
    while len(data) >= HEAD_BYTES and len(data) >= (end := HEAD_BYTES + int.from_bytes(data[:3], "big")):
        frames.append((data[3], data[4], int.from_bytes(data[5:9], "big"), data[HEAD_BYTES:end]))
        data = data[end:]
    return frames, data


def call_headers(stream: int, path: str) -> bytes:
    """The frame that begins a gRPC call."""
    headers = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x"}
    headers |= {"content-type": "application/grpc", "te": "trailers"}
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in headers.items()
    )
    return frame(HEADERS, END_HEADERS, stream, block)
