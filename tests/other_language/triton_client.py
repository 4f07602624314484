"""Asks a server through Triton's client: python triton_client.py ADDRESS LABEL_TASK JSON_TASK TEXT...

Runs in an environment of its own (requirements/triton.lock), so it imports nothing of this project. Prints one JSON
object.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

address, label_task, json_task, *texts = sys.argv[1:]


def infer(model: str, texts: list[str], *names: str, **given: Any) -> triton.InferResult:
    tensor = triton.InferInput("text_input", [len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array(texts, dtype=object))
    outputs = [triton.InferRequestedOutput(name) for name in names] or None
    return client.infer(model, [tensor], outputs=outputs, **given)


def texts_of(result: triton.InferResult, name: str) -> list[str]:
    return [each.decode() for each in result.as_numpy(name)]


def error_of(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except InferenceServerException as error:
        return error.status(), error.message()
    raise AssertionError("no error")


with triton.InferenceServerClient(address) as client:
    scored = infer(label_task, texts, "label", "probabilities", "labels")
    probabilities = scored.as_numpy("probabilities")
    parameters = {"max_tokens": 48, "temperature": 0.0}
    written = infer(json_task, texts[:1], request_id="7", priority=1, parameters=parameters)
    response = written.get_response()
    found = {
        "ready": client.is_server_live() and client.is_server_ready() and client.is_model_ready(label_task),
        "index": [model["name"] for model in client.get_model_repository_index(as_json=True)["models"]],
        "metadata": client.get_model_metadata(label_task, as_json=True),
        "label": texts_of(scored, "label"),
        "labels": texts_of(scored, "labels"),
        "probabilities": probabilities.tolist(),
        "datatype": str(probabilities.dtype),
        "json": texts_of(written, "text_output"),
        "id": response.id,
        "prompt_tokens": response.parameters["prompt_tokens"].int64_param,
        "no_task": error_of(lambda: infer("no-such-task", texts)),
        "cold": error_of(lambda: infer(json_task, texts, parameters={"temperature": -1.0})),
        "timeout": error_of(lambda: infer(json_task, texts, timeout=1_000_000)),
        "late": error_of(lambda: infer(json_task, texts, client_timeout=0.001)),
        "config": error_of(lambda: client.get_model_config(label_task)),
    }
print(json.dumps(found))
