"""The plugin's changes to a vLLM process, and the switch that keeps it out."""

import os
import subprocess
import sys

import pytest

from mtlora import vllm_plugin
from mtlora.backbone import BackboneIdentity
from mtlora.config import MtLoRAConfig
from mtlora.vllm_plugin.seams import SUPPORTED_VLLM
from tests.engine._models import make_adapter


@pytest.fixture
def installed():
    vllm_plugin.register()


def test_registering_again_changes_nothing(installed):
    from vllm.config.lora import LoRAConfig
    from vllm.platforms import current_platform
    from vllm.v1.worker import lora_model_runner_mixin

    before = (
        lora_model_runner_mixin.LRUCacheWorkerLoRAManager,
        LoRAConfig.compute_hash,
        type(current_platform).__dict__["check_and_update_config"],
    )
    assert before[0].__module__.startswith("mtlora.")
    vllm_plugin.register()
    assert before == (
        lora_model_runner_mixin.LRUCacheWorkerLoRAManager,
        LoRAConfig.compute_hash,
        type(current_platform).__dict__["check_and_update_config"],
    )


def test_model_inspection_starts_no_process(installed, monkeypatch, tmp_path):
    from vllm.model_executor.models import registry

    def none(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(registry.subprocess, "run", none)
    model = registry._LazyRegisteredModel("vllm.model_executor.models.llama", "LlamaForCausalLM")
    # Without the cache, which would answer instead.
    monkeypatch.setattr(model.__class__, "_load_modelinfo_from_cache", lambda *_: None)
    assert model.inspect_model_cls().is_text_generation_model


def test_switch_keeps_the_plugin_out():
    code = """
import os
from vllm.config.lora import LoRAConfig
from vllm.plugins import load_general_plugins
from vllm.v1.worker import lora_model_runner_mixin as mixin
from mtlora.vllm_plugin import register

load_general_plugins()
print(mixin.LRUCacheWorkerLoRAManager.__module__, LoRAConfig.compute_hash.__module__)
os.environ["MTLORA_PLUGIN"] = "1"
register()
print(mixin.LRUCacheWorkerLoRAManager.__module__, LoRAConfig.compute_hash.__module__)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"MTLORA_PLUGIN": "0"}, capture_output=True, text=True
    )
    assert result.stdout.splitlines()[-2:] == [
        "vllm.lora.worker_manager vllm.config.lora",
        "mtlora.vllm_plugin.worker_manager mtlora.vllm_plugin.compilation",
    ], result.stderr


def test_error_names_the_unsupported_vllm(installed, monkeypatch):
    from vllm.lora import worker_manager
    from vllm.v1.worker import lora_model_runner_mixin

    stock = worker_manager.LRUCacheWorkerLoRAManager
    monkeypatch.setattr(lora_model_runner_mixin, "LRUCacheWorkerLoRAManager", stock)
    monkeypatch.delattr(stock, "_apply_adapters")
    monkeypatch.delattr(worker_manager.WorkerLoRAManager, "_apply_adapters")
    with pytest.raises(RuntimeError, match="_apply_adapters") as raised:
        vllm_plugin.register()
    assert f"supports vLLM {SUPPORTED_VLLM}" in str(raised.value)
    assert "MTLORA_PLUGIN=0" in str(raised.value)


def test_compile_cache_key_contains_the_plugins_layout(installed, monkeypatch):
    from vllm.config.lora import LoRAConfig

    from mtlora.vllm_plugin import compilation

    key = LoRAConfig(max_loras=4).compute_hash()
    assert key == LoRAConfig(max_loras=4).compute_hash()
    assert key != LoRAConfig(max_loras=5).compute_hash()
    monkeypatch.setattr(compilation, "LAYOUT_VERSION", compilation.LAYOUT_VERSION + 1)
    assert key != LoRAConfig(max_loras=4).compute_hash()


@pytest.mark.parametrize("graphs", ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY", "FULL", "PIECEWISE", "NONE"])
def test_cuda_graphs_stay_as_vllm_has_them(installed, graphs):
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, VllmConfig
    from vllm.config.lora import LoRAConfig

    from mtlora.vllm_plugin.compilation import adapt, check_config

    config = VllmConfig(compilation_config=CompilationConfig())
    seen, splitting = [], []
    for lora in (None, LoRAConfig()):
        config.compilation_config = CompilationConfig(
            mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=CUDAGraphMode[graphs]
        )
        config.lora_config = lora
        adapt(config, lambda config: seen.append(config.lora_config))
        check_config(config)
        config.compilation_config.set_splitting_ops_for_v1("naive")
        splitting.append(config.compilation_config.splitting_ops)
        assert config.compilation_config.cudagraph_mode.name == graphs
        assert config.lora_config is lora
    assert seen == [None, None]
    assert splitting[0] == splitting[1]
    assert not [name for name in splitting[1] if "mtlora" in name]


def test_refuses_micro_batches_by_name(installed):
    from vllm.config import VllmConfig

    from mtlora.vllm_plugin.compilation import check_config

    config = VllmConfig()
    config.parallel_config.enable_dbo = True
    with pytest.raises(ValueError, match="use_ubatching"):
        check_config(config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"block": "ffn"}, r"mtlora\.block: no such option; allowed: host_cache_bytes, blocks"),
        ({"blocks": "mlp"}, r"mtlora\.blocks: found 'mlp'; allowed: ffn, attention, both"),
        ({"max_rank": 0}, r"mtlora\.max_rank: found 0"),
    ],
)
def test_options_travel_in_the_engines_config(given, message):
    from mtlora.vllm_plugin.options import KEY, Options

    options = Options(host_cache_bytes=3, blocks="ffn", side_stream=True)
    assert Options.of(vllm_plugin.engine_overrides(4, options)["additional_config"]) == options
    assert Options.of(None) == Options.of({}) == Options()
    with pytest.raises(ValueError, match=message):
        Options.of({KEY: given})


@pytest.mark.parametrize("task_bias", [True, False])
def test_tasks_without_biases_share_a_request(task_bias, tmp_path):
    from mtlora.vllm_plugin.naming import parse_slot_path
    from mtlora.vllm_plugin.requests import slot_requests

    backbone = BackboneIdentity(
        architecture="LlamaForCausalLM", hidden_size=16, num_layers=1, weights_fingerprint="0" * 64
    )
    folder = tmp_path / "a"
    manifest = make_adapter(folder, backbone, MtLoRAConfig(r=2, task_bias=task_bias), num_tasks=3)
    requests = slot_requests("a", "7", folder, manifest, 11)
    assert list(requests) == ["t0", "t1", "t2"]
    if task_bias:
        assert [request.lora_int_id for request in requests.values()] == [11, 12, 13]
        assert parse_slot_path(requests["t1"].lora_path) == (folder, "t1")
        assert requests["t1"].lora_name == "a/7#t1"
    else:
        assert {(r.lora_int_id, r.lora_name, r.lora_path) for r in requests.values()} == {(11, "a/7", str(folder))}
