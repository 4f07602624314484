"""The Open Inference Protocol v2 over gRPC, for KServe's and Triton's clients: every task is a model."""

from server.rpc.openinference.servicer import OpenInferenceServicer

__all__ = ["OpenInferenceServicer"]
