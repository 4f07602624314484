"""A worker that computes features of random images, one whole batch after another.

Settings: {"model": folder, "kind": "engine" | "transformers" | "onnx", "dtype": name, and for an engine "arguments" of
vLLM's EngineArgs, for ONNX Runtime "file" and "threads"}. Message: {"images": n, "size": pixels, "batch": b, "slots":
[[lora_name, lora_int_id, lora_path] or null, ...] or absent}. Reply: {"seconds": s, "features": n}. The time includes
the embedding of patches. Image i has slots[i % len(slots)].

Shape suffixes: B images, C channels, S pixels of a side.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.worker import Handle, serve

# Runs a batch, whose first image has this number; returns how many features it made.
Run = Callable[[torch.Tensor, int, list[Any]], int]


def _engine(settings: dict[str, Any]) -> Run:
    """vLLM's synchronous engine."""
    from vllm import EngineArgs, LLMEngine
    from vllm.lora.request import LoRARequest

    from mtlora.vision.encoder import load_encoder
    from mtlora.vllm_vision import feature_params, image_prompt, vision_engine_args

    folder, arguments = Path(settings["model"]), dict(settings["arguments"])
    engine = LLMEngine.from_engine_args(
        EngineArgs(**vision_engine_args(folder) | {"dtype": settings["dtype"]} | arguments)
    )
    dtype = engine.model_config.dtype
    encoder, loaded = load_encoder(folder, dtype), set()

    def run(pixels_BCSS: torch.Tensor, first: int, slots: list[Any]) -> int:
        for i, x_TD in enumerate(encoder.embed(pixels_BCSS), start=first):
            slot = slots[i % len(slots)]
            request = LoRARequest(*slot) if slot else None
            engine.add_request(str(i), image_prompt(x_TD), feature_params(), lora_request=request)
        made = 0
        while engine.has_unfinished_requests():
            made += sum(output.finished for output in engine.step())
        return made

    def load(slots: list[Any]) -> None:
        for name, number, path in filter(None, slots):
            if number not in loaded:
                engine.add_lora(LoRARequest(name, number, path))
                loaded.add(number)

    run.load = load  # type: ignore[attr-defined]
    return run


def _transformers(settings: dict[str, Any]) -> Run:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(settings["model"], dtype=settings["dtype"], attn_implementation="sdpa").eval()

    def run(pixels_BCSS: torch.Tensor, first: int, slots: list[Any]) -> int:
        return len(model(pixel_values=pixels_BCSS.to(model.dtype)).last_hidden_state)

    return run


def _onnx(settings: dict[str, Any]) -> Run:
    """The encoder within the default backbone's ONNX file."""
    import onnxruntime

    from mtlora.vision.onnx_file import read_model

    model = read_model(Path(settings["file"]))
    last = [node for node in model.graph.node if node.name.startswith("/backbone/layernorm/")][-1].output[0]
    for side in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        side.Clear()
        side.dim_param = "side"
    del model.graph.output[:]
    model.graph.output.add(name=last)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings["threads"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (pixels,) = session.get_inputs()

    def run(pixels_BCSS: torch.Tensor, first: int, slots: list[Any]) -> int:
        return len(session.run([last], {pixels.name: pixels_BCSS.numpy()})[0])

    return run


def start(settings: dict[str, Any]) -> Handle:
    """Load the backbone."""
    torch.set_grad_enabled(False)
    run = {"engine": _engine, "transformers": _transformers, "onnx": _onnx}[settings["kind"]](settings)

    def answer(case: dict[str, Any]) -> dict[str, Any]:
        slots = case.get("slots") or [None]
        if hasattr(run, "load"):
            run.load(slots)
        pixels_BCSS = torch.randn(case["images"], 3, case["size"], case["size"])
        began, made = time.perf_counter(), 0
        for first in range(0, case["images"], case["batch"]):
            made += run(pixels_BCSS[first : first + case["batch"]], first, slots)
        return {"seconds": time.perf_counter() - began, "features": made}

    return answer


if __name__ == "__main__":
    serve(start)
