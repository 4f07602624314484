proto:
	.venv/bin/python -m grpc_tools.protoc -Imtlora_pb=proto/mtlora --python_out=proto/gen --pyi_out=proto/gen --grpc_python_out=proto/gen mtlora_pb/v1/inference.proto
