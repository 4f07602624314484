"""Every seam: a place where a part of vLLM is replaced or relied on though it is not public, or a process is treated
specially.

`require` and `available` check the vLLM of this process. `mtlora seams` checks sources without importing them, so this
module does not import vLLM.
"""

import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

SUPPORTED_VLLM = "0.32"
ENVIRONMENT_SWITCH = "MTLORA_PLUGIN"

logger = logging.getLogger(__name__)


class Need(StrEnum):
    """What a seam is needed for. If a seam that correctness needs is missing, the engine does not start."""

    CORRECTNESS = "correctness"
    OPERATION = "operation"
    SPEED = "speed"


@dataclass(frozen=True)
class Seam:
    """A seam and the names of vLLM that it needs.

    points: "module:attribute", or "module:attribute(parameters)" for a function, without self and cls. Empty for a seam
    that does not touch vLLM. taken_in: the module of this project that takes it. without: what happens where it is
    missing or left out.
    """

    name: str
    need: Need
    taken_in: str
    points: tuple[str, ...]
    without: str


@dataclass(frozen=True)
class Parameter:
    """A parameter of a function of vLLM's."""

    name: str
    optional: bool = False


Signature = Sequence[Parameter]
# The signature of "module", "attribute": None for what is no function. Raises LookupError where it is missing.
Find = Callable[[str, str], Signature | None]

# A function that takes any arguments.
ANY: Signature = (Parameter("*"),)

SEAMS = (
    Seam(
        "adapters",
        Need.CORRECTNESS,
        "mtlora.vllm_plugin.install",
        (
            "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager",
            "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._manager_cls",
            "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.create_lora_manager(model, vllm_config)",
            "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._apply_adapters(lora_requests)",
            "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.add_adapter(lora_request)",
            "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.add_dummy_lora(lora_request, rank)",
            "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.remove_adapter(adapter_id)",
            "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.pin_adapter(adapter_id)",
            "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.list_adapters()",
            "vllm.lora.model_manager:LRUCacheLoRAModelManager._init_punica_wrapper(max_num_batched_tokens, "
            "vllm_config)",
            "vllm.lora.model_manager:LRUCacheLoRAModelManager._create_lora_modules()",
            "vllm.lora.model_manager:LRUCacheLoRAModelManager._add_adapter(lora)",
            "vllm.lora.model_manager:LRUCacheLoRAModelManager._set_adapter_mapping(mapping)",
            "vllm.lora.model_manager:LRUCacheLoRAModelManager.deactivate_adapter(adapter_id)",
            "vllm.lora.model_manager:LRUCacheLoRAModelManager.remove_all_adapters()",
            "vllm.lora.model_manager:LRUCacheLoRAModelManager.remove_oldest_adapter()",
            "vllm.lora.layers:BaseLayerWithLoRA",
            "vllm.lora.layers:LoRAMapping.index_mapping",
            "vllm.lora.utils:replace_submodule(model, module_name, new_module)",
            "vllm.utils.gpu_sync_debug:gpu_sync_allowed()",
        ),
        "no adapter of this project's format is served",
    ),
    Seam(
        "operators",
        Need.CORRECTNESS,
        "mtlora.vllm_plugin.block",
        (
            "vllm.utils.torch_utils:direct_register_custom_op(op_name, op_func, mutates_args, fake_impl, target_lib)",
            "vllm.utils.torch_utils:LayerNameType",
            "vllm.utils.torch_utils:_encode_layer_name(layer_name)",
            "vllm.utils.torch_utils:_resolve_layer_name(layer_name)",
            "vllm.forward_context:get_forward_context()",
            "vllm.forward_context:ForwardContext.no_compile_layers",
            "vllm.config:CompilationConfig.static_forward_context",
        ),
        "compiled engines run no adapters",
    ),
    Seam(
        "compile cache key",
        Need.CORRECTNESS,
        "mtlora.vllm_plugin.compilation",
        ("vllm.config.lora:LoRAConfig.compute_hash()",),
        "a new release of the plugin runs graphs compiled for an old one",
    ),
    Seam(
        "engine config",
        Need.CORRECTNESS,
        "mtlora.vllm_plugin.compilation",
        (
            "vllm.platforms.interface:Platform.check_and_update_config(vllm_config)",
            "vllm.config:ParallelConfig.use_ubatching",
        ),
        "CPUs never compile with adapters; micro-batches run with the plan of the whole step",
    ),
    Seam(
        "typed answers",
        Need.CORRECTNESS,
        "mtlora.vllm_plugin.typed",
        (
            "vllm.sampling_params:SamplingParams._validate_structured_outputs(model_config, structured_outputs_config, "
            "tokenizer)",
            "vllm.v1.structured_output:StructuredOutputManager.grammar_init(request)",
            "vllm.v1.structured_output.backend_types:StructuredOutputGrammar.fill_bitmask(bitmask, batch_index)",
            "vllm.v1.engine.core:EngineCore",
        ),
        "answers are not held to their task's type",
    ),
    Seam(
        "types in vLLM's server",
        Need.OPERATION,
        "mtlora.vllm_plugin.served_types",
        (
            "vllm.v1.engine.core_client:AsyncMPClient.add_lora_async(lora_request)",
            "vllm.v1.engine.core_client:AsyncMPClient.call_utility_async(method)",
            "vllm.v1.engine.input_processor:InputProcessor.process_inputs(request_id, prompt, params, supported_tasks, "
            "arrival_time, lora_request)",
            "vllm.utils:length_from_prompt_token_ids_or_embeds(prompt_token_ids, prompt_embeds)",
        ),
        "vLLM's own server leaves answers free; mtlora-server does not",
    ),
    Seam(
        "activation",
        Need.CORRECTNESS,
        "mtlora.vllm_plugin.activation",
        (
            "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys(request, start_token_idx, end_token_idx, "
            "start_mm_idx)",
            "vllm.v1.core.block_pool:generate_block_hash_extra_keys",
            "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.set_active_loras(input_batch, "
            "num_scheduled_tokens, num_sampled_tokens, mapping_type)",
            "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin._set_active_loras(prompt_lora_mapping, "
            "token_lora_mapping, lora_requests, mapping_type)",
            "vllm.v1.worker.gpu_input_batch:InputBatch.make_lora_inputs(num_scheduled_tokens, num_sampled_tokens)",
            "vllm.v1.engine.input_processor:InputProcessor.process_inputs(request_id, prompt, params, supported_tasks)",
            "vllm.sampling_params:SamplingParams.extra_args",
        ),
        "adapters act on every token, and share no blocks",
    ),
    Seam(
        "activation in the second model runner",
        Need.CORRECTNESS,
        "mtlora.vllm_plugin.activation",
        (
            "vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests(scheduler_output)",
            "vllm.v1.worker.gpu.lora_utils:LoraState.make_lora_inputs(req_ids, idx_mapping, num_scheduled_tokens)",
            "vllm.v1.worker.gpu.lora_utils:LoraState.remove_request(req_id)",
        ),
        "the same, where vLLM runs its second model runner",
    ),
    Seam(
        "leases of documents",
        Need.SPEED,
        "mtlora.vllm_plugin.leases",
        (
            "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots(request, num_new_tokens)",
            "vllm.v1.core.kv_cache_manager:KVCacheManager.free(request)",
            "vllm.v1.core.kv_cache_manager:KVCacheManager.pop_blocks_for_free(request)",
            "vllm.v1.core.kv_cache_manager:KVCacheManager.reset_prefix_cache()",
            "vllm.v1.core.kv_cache_manager:KVCacheManager.get_blocks(request_id)",
            "vllm.v1.core.block_pool:BlockPool.touch(blocks)",
            "vllm.v1.core.block_pool:BlockPool.free_blocks(ordered_blocks)",
        ),
        "documents leave the cache as soon as other requests need their place",
    ),
    Seam(
        "vision backbones",
        Need.OPERATION,
        "mtlora.vllm_vision",
        (
            "vllm.model_executor.layers.attention:EncoderOnlyAttention",
            "vllm.model_executor.layers.pooler.abstract:Pooler",
            "vllm.model_executor.models.interfaces_base:attn_type(attn_type)",
            "vllm.model_executor.models.interfaces_base:default_pooling_type(seq_pooling_type)",
            "vllm.compilation.decorators:support_torch_compile",
            "vllm.inputs.engine:embeds_input(prompt_embeds)",
        ),
        "no vision backbone is served",
    ),
    Seam(
        "soft tokens",
        Need.OPERATION,
        "mtlora.vllm_plugin.requests",
        (
            "vllm.inputs.engine:embeds_input(prompt_embeds, prompt, cache_salt, prompt_token_ids, is_token_ids)",
            "vllm.v1.core.kv_cache_utils:_gen_prompt_embeds_extra_hash_keys(request, start_token_idx, end_token_idx)",
        ),
        "text tasks that take an image have no answer",
    ),
    Seam(
        "seeded requests on CPUs",
        Need.CORRECTNESS,
        "mtlora.vllm_cpu.seeded",
        (
            "vllm.v1.worker.cpu_model_runner:CPUModelRunner._sample(logits, spec_decode_metadata)",
            "vllm.v1.worker.cpu_model_runner:CPUModelRunner._bookkeeping_sync(scheduler_output, sampler_output, "
            "logits, hidden_states, num_scheduled_tokens)",
        ),
        "a request with a seed whose prompt takes several steps ends the engine",
    ),
    Seam(
        "pipeline stages on CPUs",
        Need.CORRECTNESS,
        "mtlora.vllm_cpu.pipeline",
        (
            "vllm.v1.worker.cpu_worker:CPUWorker._should_warm_up_model()",
            "vllm.v1.worker.cpu_model_runner:CPUModelRunner.warming_up_model()",
            "vllm.v1.worker.cpu_model_runner:CPUModelRunner.profile_run()",
        ),
        "the first step of an eager pipeline ends the engine",
    ),
    Seam(
        "answers of every engine",
        Need.CORRECTNESS,
        "server.engine.engine",
        ("vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async(method)",),
        "adapters are loaded into the first of several engines alone",
    ),
    Seam(
        "lost engines",
        Need.CORRECTNESS,
        "server.engine.engine",
        (
            "vllm.v1.engine.core_client:BackgroundResources.engine_manager",
            "vllm.v1.engine.core_client:BackgroundResources.engine_dead",
        ),
        "a hung engine cannot be killed and replaced",
    ),
    Seam(
        "step statistics",
        Need.CORRECTNESS,
        "server.engine.stats",
        (
            "vllm.v1.metrics.loggers:PrometheusStatLogger.record(scheduler_stats, iteration_stats, mm_cache_stats, "
            "engine_idx)",
            "vllm.v1.metrics.loggers:PrometheusStatLogger.log_engine_initialized()",
            "vllm.v1.metrics.loggers:PrometheusStatLogger.record_sleep_state(sleep, level)",
            "vllm.v1.metrics.loggers:PrometheusStatLogger.record_admission_rejection(reason)",
        ),
        "no step is seen, so a queue looks like a hang",
    ),
    Seam(
        "second stream",
        Need.SPEED,
        "mtlora.vllm_plugin.gpu_step",
        ("vllm.compilation.breakable_cudagraph:BreakableCUDAGraphCapture.is_active()",),
        "no part of an adapter's path runs beside its block",
    ),
    Seam(
        "model inspection on CPUs",
        Need.OPERATION,
        "mtlora.vllm_cpu.inspection",
        ("vllm.model_executor.models.registry:_run_in_subprocess(fn)",),
        "a start with an empty cache takes the time of one more process's imports",
    ),
    Seam(
        "single calls on CPUs",
        Need.SPEED,
        "mtlora.vllm_cpu.eager_cpu",
        (
            "vllm.model_executor.custom_op:CustomOp.register_oot(_decorated_op_cls, name)",
            "vllm.model_executor.layers.activation:SiluAndMul.forward_cpu(x)",
            "vllm.platforms.interface:Platform.import_ir_kernels()",
            "vllm.platforms.interface:Platform.get_default_ir_op_priority(vllm_config)",
            "vllm.ir.ops.layernorm:rms_norm(x, weight, epsilon, variance_size)",
            "vllm.ir.ops.layernorm:fused_add_rms_norm(x, x_residual, weight, epsilon, variance_size)",
            "vllm.ir.op:IrOp.register_impl(provider, supported, supports_args, inplace)",
        ),
        "eager norms and gates take several calls each",
    ),
    Seam(
        "masks on CPUs",
        Need.SPEED,
        "mtlora.vllm_cpu.masks",
        (
            "vllm.v1.worker.gpu_model_runner:apply_grammar_bitmask(scheduler_output, grammar_output, input_batch, "
            "logits)",
            "vllm.v1.core.sched.output:GrammarOutput.structured_output_request_ids",
            "vllm.v1.core.sched.output:GrammarOutput.grammar_bitmask",
            "vllm.v1.core.sched.output:SchedulerOutput.scheduled_spec_decode_tokens",
        ),
        "masking an answer of few allowed tokens takes 0.2 ms a sequence and step",
    ),
    Seam(
        "cores of two engines",
        Need.SPEED,
        "mtlora.vllm_cpu.sharing_executor",
        (
            "vllm.v1.executor.uniproc_executor:UniProcExecutor._init_executor()",
            "vllm.v1.executor.uniproc_executor:UniProcExecutor.execute_model(scheduler_output, non_block)",
            "vllm.v1.executor.uniproc_executor:UniProcExecutor.sample_tokens(grammar_output, non_block)",
        ),
        "two engines of a server run threads on every core and wait for each other",
    ),
    Seam(
        "one process an engine on CPUs",
        Need.SPEED,
        "server.engine.launch",
        (
            "vllm.v1.executor.uniproc_executor:UniProcExecutor",
            "vllm.utils.ompmultiprocessing:OMPProcessManager.configure_omp_envs(rank, local_rank)",
        ),
        "two processes exchange every step's messages, on the cores that the model needs",
    ),
    Seam(
        "environment read once",
        Need.SPEED,
        "server.engine.launch",
        ("vllm.envs:enable_envs_cache()", "vllm.envs:disable_envs_cache()"),
        "the server reads vLLM's environment variables anew with every request",
    ),
    Seam(
        "engines end with the server",
        Need.OPERATION,
        "server.engine.orphans",
        (),
        "an engine outlives a server that was killed, and keeps its memory",
    ),
    Seam(
        "garbage of imports",
        Need.OPERATION,
        "mtlora.vllm_plugin.install",
        (),
        "starts search all imported objects for garbage several times",
    ),
    Seam(
        "huge pages on CPUs",
        Need.SPEED,
        "mtlora.vllm_cpu.memory",
        (),
        "weights lie in small pages",
    ),
    Seam(
        "every core",
        Need.SPEED,
        "server.engine.threads",
        (),
        "vLLM keeps a core for itself, and refuses more ranks than NUMA nodes",
    ),
    Seam(
        "first model runner for images",
        Need.OPERATION,
        "server.engine.launch",
        (),
        "vision engines do not start on GPUs: vLLM's second model runner refuses images as prompts of embeddings",
    ),
    Seam(
        "eager sampling",
        Need.OPERATION,
        "server.engine.launch",
        (),
        "the first request that samples waits while two functions are compiled, though the engine is eager",
    ),
    Seam(
        "loading beside steps",
        Need.OPERATION,
        "mtlora.vllm_plugin.worker_manager",
        (),
        "a second team of threads races the steps while an adapter is read",
    ),
)

_POINT = re.compile(r"(?P<module>[\w.]+):(?P<attribute>[\w.]+)(?:\((?P<parameters>[\w, ]*)\))?")


def require(name: str) -> None:
    """Raise RuntimeError where this process's vLLM lacks a seam that correctness needs."""
    if missing := _missing_here(name):
        import vllm

        raise RuntimeError(
            f"the mtlora plugin supports vLLM {SUPPORTED_VLLM}, this is {vllm.__version__}: "
            f"seam {name!r}: {'; '.join(missing)}. "
            f"Install a supported version, or set {ENVIRONMENT_SWITCH}=0 to run vLLM without mtLoRA adapters."
        )


def available(name: str) -> bool:
    """Whether this process's vLLM has a seam that it can run without; logs one line where it does not."""
    missing = _missing_here(name)
    if missing:
        logger.warning("vLLM lacks seam %r (%s): %s", name, "; ".join(missing), _seam(name).without)
    return not missing


def missing_points(seam: Seam, find: Find) -> Iterator[str]:
    """Describe each point of a seam that `find` does not find, or finds with another signature."""
    for point in seam.points:
        match = _POINT.fullmatch(point)
        assert match is not None, point
        where = f"{match['module']}.{match['attribute']}"
        try:
            found = find(match["module"], match["attribute"])
        except LookupError:
            yield f"vLLM has no {where}"
            continue
        if match["parameters"] is None:
            continue
        expected = [name for name in match["parameters"].split(", ") if name]
        if found is None:
            yield f"{where} is no function"
        elif not accepts(found, expected):
            takes = ", ".join(parameter.name for parameter in found)
            yield f"{where} takes ({takes}), expected ({', '.join(expected)})"


def accepts(found: Signature, expected: Sequence[str]) -> bool:
    """Whether a function takes the expected parameters, in this order, and needs no further one."""
    if found == ANY:
        return True
    names = [parameter.name for parameter in found[: len(expected)]]
    return names == list(expected) and all(parameter.optional for parameter in found[len(expected) :])


def find_imported(module: str, attribute: str) -> Signature | None:
    """A `Find` in this process."""
    try:
        owner: Any = importlib.import_module(module)
    except ImportError:
        raise LookupError(module) from None
    *path, last = attribute.split(".")
    for name in path:
        owner = getattr(owner, name, None)
    is_class = inspect.isclass(owner)
    try:
        value = inspect.getattr_static(owner, last)
    except AttributeError:
        # A field without a default is no attribute of its class.
        if is_class and any(last in vars(base).get("__annotations__", ()) for base in owner.__mro__):
            return None
        raise LookupError(attribute) from None
    bound = is_class and not isinstance(value, staticmethod)
    function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    if inspect.isclass(function) or not callable(function):
        return None
    parameters = list(inspect.signature(function).parameters.values())[1 if bound else 0 :]
    if [parameter.kind for parameter in parameters] == [
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    ]:
        return ANY
    return [
        Parameter(parameter.name, parameter.default is not parameter.empty or parameter.kind in _COLLECTING)
        for parameter in parameters
    ]


_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _seam(name: str) -> Seam:
    return next(seam for seam in SEAMS if seam.name == name)


def _missing_here(name: str) -> tuple[str, ...]:
    return tuple(missing_points(_seam(name), find_imported))
