"""`mtlora convert`: a converted adapter computes what the authors' module computes; wrong files are refused by name."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mtlora.adapter import AdapterSet
from mtlora.backbone import BackboneIdentity
from mtlora.checkpoint.convert import ConversionError, convert_tensors, read_tasks
from mtlora.checkpoint.read import read_checkpoint
from mtlora.cli import main
from mtlora.errors import MtLoRAError
from tests.engine._models import HIDDEN_SIZE, HuggingFace, make_model
from tests.mtlora.authors import AuthorsBlockAdapter, attach_authors, authors_state

D, LAYERS = 8, 2
PREFIX = "base_model.model.model."


def state_of(
    modules: tuple[str, ...] = ("mlp",), *, r: int = 2, num_experts: int = 3, num_groups: int = 2, layers: int = LAYERS,
    prefix: str = PREFIX, seed: int = 0,
) -> dict[str, torch.Tensor]:  # fmt: skip
    torch.manual_seed(seed)
    return authors_state(
        {
            (layer, module): AuthorsBlockAdapter(D, r, num_experts, lora_alpha=4.0, num_groups=num_groups)
            for layer in range(layers)
            for module in modules
        },
        prefix,
    )


def converted(state: dict[str, Any], **changed: Any) -> Any:
    return convert_tensors(state, **({"hidden_size": D, "num_layers": LAYERS, "lora_alpha": 4.0} | changed))


# ---- what is right ---------------------------------------------------------------------------------------------------


@given(
    st.sampled_from([("mlp",), ("self_attn",), ("self_attn", "mlp")]),
    st.integers(1, 5),
    st.integers(1, 12),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 3),
    st.sampled_from(["", "model.", PREFIX, "module.x.layers.7.y."]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60)
def test_every_key_is_converted_to_its_place(
    modules, r, num_experts, num_groups, layers, prefix, hydra, chooser
) -> None:
    num_groups = 1 if num_experts == 1 else num_groups
    state = state_of(modules, r=r, num_experts=num_experts, num_groups=num_groups, layers=layers, prefix=prefix)
    original = dict(state)
    if hydra:
        for i in range(num_experts):
            state = {
                k.replace(f"block_adapter.lora_B.{i}.weight", f"lora_B{i}.weight").replace("block_adapter.", ""): v
                for k, v in state.items()
            }
    state[f"{prefix}layers.0.mlp.down_proj.weight"] = torch.zeros(D, 2)
    keys = list(state)
    chooser.shuffle(keys)
    config, tensors = converted({key: state[key] for key in keys}, num_layers=layers)
    assert (config.r, config.num_experts, config.num_groups) == (r, num_experts, num_groups)
    assert set(config.modules) == set(modules)
    assert config.scaling == 4.0 / r
    for layer in range(layers):
        for module in modules:
            theirs, ours = f"{prefix}layers.{layer}.{module}.block_adapter", f"layers.{layer}.{module}"
            assert torch.equal(tensors[f"{ours}.lora_A"], original[f"{theirs}.lora_A.weight"])
            for i in range(num_experts):
                assert torch.equal(tensors[f"{ours}.lora_B"][i], original[f"{theirs}.lora_B.{i}.weight"])
            if num_experts > 1:
                assert torch.equal(tensors[f"{ours}.lora_route"], original[f"{theirs}.lora_route.weight"])
    assert len(tensors) == 3 * layers * len(modules)


@pytest.mark.parametrize("blocks", [("mlp",), ("self_attn",), ("self_attn", "mlp")], ids=["ffn", "attention", "both"])
@pytest.mark.parametrize(("num_experts", "num_groups"), [(5, 4), (3, 1), (1, 1)])
def test_the_converted_adapter_equals_the_authors_loop(tmp_path, blocks, num_experts, num_groups) -> None:
    folder = make_model(tmp_path / "model", "llama")
    reference = HuggingFace(folder)
    theirs = random_adapters(blocks, num_experts, num_groups)
    torch.save(authors_state(theirs, PREFIX), tmp_path / "pytorch_model.bin")
    arguments = ["convert", str(tmp_path / "pytorch_model.bin"), str(tmp_path / "ours"), "--backbone", str(folder)]
    assert main([*arguments, "--alpha", "12", "--task", "some_task"]) == 0
    checkpoint = read_checkpoint(tmp_path / "ours", reference.backbone)
    assert [task.id for task in checkpoint.manifest.tasks] == ["some_task"]

    ours = AdapterSet(checkpoint.manifest.config, HIDDEN_SIZE, reference.backbone.num_layers, 1)
    ours.load_state_dict(checkpoint.tensors)
    tokens = torch.randint(3, 90, (3, 17), generator=torch.Generator().manual_seed(1))
    outputs, bare = {}, reference.model(tokens).logits
    for name, attach in (("theirs", lambda m: attach_authors(m, theirs)), ("ours", ours.attach)):
        handles = attach(reference.model)
        outputs[name] = reference.model(tokens).logits
        for handle in handles:
            handle.remove()
    assert (outputs["theirs"] - bare).abs().max() > 0.5, "an adapter that changes nothing tests nothing"
    torch.testing.assert_close(outputs["ours"], outputs["theirs"], atol=5e-5, rtol=1e-5)

    # Gradients too: A, the experts and the routers learn the same.
    for attach in (lambda m: attach_authors(m, theirs), ours.attach):
        handles = attach(reference.model)
        reference.model(tokens).logits.square().mean().backward()
        for handle in handles:
            handle.remove()
    for (layer, module), block in theirs.items():
        mine = ours.get_submodule(f"layers.{layer}.{module}")
        torch.testing.assert_close(mine.lora_A.grad, block.lora_A.weight.grad, atol=1e-5, rtol=1e-3)
        expected_B = torch.stack([expert.weight.grad for expert in block.lora_B])
        torch.testing.assert_close(mine.lora_B.grad, expected_B, atol=1e-5, rtol=1e-3)
        if num_experts > 1:
            torch.testing.assert_close(mine.lora_route.grad, block.lora_route.weight.grad, atol=1e-5, rtol=1e-3)


def random_adapters(blocks: tuple[str, ...], num_experts: int, num_groups: int) -> dict[tuple[int, str], nn.Module]:
    torch.manual_seed(0)
    theirs = {}
    for layer in range(2):
        for module in blocks:
            block = AuthorsBlockAdapter(HIDDEN_SIZE, 4, num_experts, lora_alpha=12.0, num_groups=num_groups)
            for expert in block.lora_B:
                nn.init.normal_(expert.weight, std=0.3)
            theirs[layer, module] = block.eval()
    return theirs


# ---- what is wrong ---------------------------------------------------------------------------------------------------

KEY = f"{PREFIX}layers.1.mlp.block_adapter"


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in state_of().items() if key not in keys}


NAN = torch.full((2, D), float("nan"))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"no key of the form .*; found nothing"),
        ({"model.embed.weight": torch.zeros(2, 2)}, r"no key of the form .*; found 'model.embed.weight'"),
        (
            {"x.layers.0.self_attn.q_proj.lora_B0.weight": torch.zeros(2, 2)},
            r"layers.0.self_attn.q_proj.lora_B0.weight: a path inside a block, at the linear layer 'q_proj'",
        ),
        (
            {"x.layers.0.mlp.up_proj.lora_A.default.weight": torch.zeros(2, 2)},
            r"at the linear layer 'up_proj': component-level",
        ),
        (state_of() | {f"{KEY}.expert_scales.0": torch.zeros(1)}, r"expert_scales.0: no part of a block-level adapter"),
        (state_of() | {f"{KEY}.lora_A.bias": torch.zeros(2)}, r"lora_A.bias: no part of a block-level adapter"),
        (state_of() | {f"{KEY}.lora_B.01.weight": torch.zeros(D, 2)}, r"lora_B.01.weight: no part of"),
        (state_of() | {"y.layers.1.mlp.lora_A.weight": torch.zeros(2, D)}, r"the same part as .*layers.1.mlp"),
        (state_of() | {f"{KEY}.lora_B1.weight": torch.zeros(D, 2)}, r"lora_B1.weight: the same part as .*lora_B.1"),
        (without(f"{KEY}.lora_A.weight"), r"layers.1.mlp: no lora_A.weight"),
        (without(f"{KEY}.lora_route.weight"), r"layers.1.mlp: no lora_route.weight; 3 experts need one \[g\*3, d\]"),
        (without(f"{KEY}.lora_B.1.weight"), r"layers.1.mlp: expert 1 of 0 to 2 is missing"),
        (without(*(f"{KEY}.lora_B.{i}.weight" for i in range(3))), r"layers.1.mlp: no lora_B.0.weight"),
        (without(f"{KEY}.lora_B.2.weight"), r"layers.1.mlp.*lora_route.weight: expected \[6, 8\]|2 experts"),
        ({k: v for k, v in state_of().items() if ".1." not in k.split("block")[0]}, r"layers.1.mlp: no path"),
        (state_of(layers=4), r"layers.2.mlp: found, but the backbone has layers 0 to 1 \(and 1 more\)"),
        (state_of(("mlp",), layers=2) | state_of(("self_attn",), layers=1), r"layers.1.self_attn: no path"),
        (state_of() | {f"{KEY}.lora_A.weight": torch.zeros(3, D)}, r"lora_A.weight: expected \[2, 8\].*found \[3, 8\]"),
        (state_of() | {f"{KEY}.lora_B.0.weight": torch.zeros(D, 3)}, r"lora_B.0.weight: expected \[8, 2\]"),
        (state_of() | {f"{KEY}.lora_route.weight": torch.zeros(3, D)}, r"lora_route.weight: expected \[6, 8\]"),
        (state_of() | {f"{KEY}.lora_A.weight": NAN}, r"lora_A.weight: expected finite values, found 16 NaN"),
        (state_of() | {f"{KEY}.lora_A.weight": 7}, r"lora_A.weight: expected a tensor, found int"),
        (state_of() | {f"{KEY}.lora_A.weight": torch.zeros(2, D, dtype=torch.int8)}, r"expected a dense tensor"),
        (state_of() | {f"{KEY}.lora_A.weight": torch.zeros(2, D).to_sparse()}, r"expected a dense tensor"),
        (state_of() | {f"{KEY}.lora_A.weight": torch.zeros(2 * D)}, r"expected two dimensions, found \[16\]"),
        (state_of() | {f"{KEY}.lora_A.weight": torch.zeros(1).expand(2, D)}, r"found \[2, 8\], 64 bytes, of 4 stored"),
        (state_of() | {f"{KEY}.lora_B.0.weight": torch.zeros(D, 2).half()}, r"experts of several dtypes"),
        (state_of(r=600), r"config: r: Input should be less than or equal to 512"),
    ],
)  # fmt: skip
def test_refuses_wrong_states_by_name(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        converted(state)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 12}, r"lora_A.weight: expected \[r, 12\], the backbone's hidden size, found \[2, 8\]"),
        ({"lora_alpha": 0.0}, r"config: lora_alpha: Input should be greater than 0"),
        ({"num_layers": 3}, r"layers.2.mlp: no path"),
    ],
)
def test_refuses_what_does_not_fit_the_backbone_or_flags(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        converted(state_of(), **changed)


def test_refuses_groups_that_do_not_divide() -> None:
    state = state_of()
    for layer in range(LAYERS):
        state[f"{PREFIX}layers.{layer}.mlp.block_adapter.lora_route.weight"] = torch.zeros(9, D)
    with pytest.raises(ConversionError, match=r"9 rows of 3 experts are 3 groups, which do not divide .* 8"):
        converted(state)
    for layer in range(LAYERS):
        state[f"{PREFIX}layers.{layer}.mlp.block_adapter.lora_route.weight"] = torch.zeros(7, D)
    with pytest.raises(ConversionError, match=r"expected rows in a multiple of the 3 experts, found 7"):
        converted(state)


@st.composite
def arbitrary_states(draw: st.DrawFn) -> dict[str, Any]:
    """A good state with some keys changed, dropped or added, and some shapes off."""
    state = dict(state_of())
    words = ["layers", "0", "1", "01", "9" * 30, "mlp", "self_attn", "q_proj", "block_adapter", "lora_A", "lora_B",
             "lora_B0", "lora_route", "weight", "bias", "default", ""]  # fmt: skip
    shapes = st.lists(st.integers(0, 9), max_size=3)
    keys = st.lists(st.sampled_from(words), max_size=8).map(".".join) | st.sampled_from(sorted(state)) | st.text()
    for key, shape in draw(st.lists(st.tuples(keys, shapes), max_size=4)):
        state[key] = torch.zeros(shape)
    for key in draw(st.sets(st.sampled_from(sorted(state)), max_size=2)):
        del state[key]
    return state


@pytest.mark.slow
@given(arbitrary_states())
def test_any_keys_and_shapes_are_converted_or_refused(state: dict[str, Any]) -> None:
    try:
        config, tensors = converted(state)
    except ConversionError:
        return
    for name in (f"layers.{layer}.{module}" for layer in range(LAYERS) for module in config.modules):
        assert tensors[f"{name}.lora_A"].shape == (config.r, D)
        assert tensors[f"{name}.lora_B"].shape == (config.num_experts, D, config.r)
        assert tensors[f"{name}.lora_route"].shape == (config.router_rows, D)


@given(st.binary(max_size=200))
@settings(max_examples=30)
def test_refuses_a_file_that_torch_did_not_write(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "x.bin"
        source.write_bytes(content)
        refused(source, Path(temporary) / "out")


def refused(source: Path, out: Path) -> str:
    from mtlora.checkpoint.convert import convert
    from mtlora.task import TaskSpec

    identity = BackboneIdentity(
        architecture="LlamaForCausalLM", hidden_size=D, num_layers=LAYERS, weights_fingerprint="ab" * 32
    )
    with pytest.raises(MtLoRAError) as caught:
        convert(source, out, backbone=identity, tasks=[TaskSpec(id="a", description="a")])
    assert not out.exists()
    return str(caught.value)


class Planted:
    """Creates a file when its pickle is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_malicious_file_runs_no_code(tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    torch.save({"layers.0.mlp.lora_A.weight": Planted(planted)}, tmp_path / "x.bin")
    assert "cannot be read as a torch file of tensors" in refused(tmp_path / "x.bin", tmp_path / "out")
    assert not planted.exists()
    torch.save([1, 2], tmp_path / "y.bin")
    assert "expected a dict of tensors" in refused(tmp_path / "y.bin", tmp_path / "out")
    assert "cannot be read" in refused(tmp_path / "nothing.bin", tmp_path / "out")


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_reads_tasks_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps([{"id": "a", "description": "A.", "template": "{text} ->", "max_new_tokens": 4}]))
    (task,) = read_tasks(path)
    assert (task.id, task.fields, task.max_new_tokens) == ("a", ("text",), 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[\n{]", r"tasks.json: .*Invalid JSON: .* at line 2 column 2"),
        ("{}", r"tasks.json: expected a list of tasks: Input should be a valid array"),
        ("[]", r"tasks.json: expected a list of tasks: Tuple should have at least 1 item"),
        ('[{"id": "a", "description": "A."}, {"id": "b"}]', r"tasks.json: .*1\.description: Field required"),
        ('[{"id": "A B", "description": "A."}]', r"tasks.json: .*0\.id: "),
        (
            '[{"id": "a", "description": "A.", "template": "none"}]',
            r"0\.template: template names no field",
        ),
        ('[{"id": "a", "description": "A.", "color": 1}]', r"tasks.json: .*0\.color: "),
    ],
)
def test_refuses_a_wrong_task_file_by_name(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tasks.json").write_text(content)
    with pytest.raises(ConversionError, match=message):
        read_tasks(tmp_path / "tasks.json")


def test_convert_command_writes_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model(tmp_path / "model", "llama")
    torch.save(authors_state(random_adapters(("mlp",), 3, 2), "model."), tmp_path / "a.bin")
    common = ["convert", str(tmp_path / "a.bin"), str(tmp_path / "out"), "--backbone", str(folder)]
    assert main([*common, "--suite", "builtin"]) == 0
    out = capsys.readouterr().out
    assert "25 tasks, blocks ffn, r 4, 3 experts, 2 groups, alpha 64 (published; --alpha sets it)" in out
    assert read_checkpoint(tmp_path / "out").manifest.config.lora_alpha == 64
    assert main([*common, "--task", "a", "--task", "a"]) == 2
    assert "expected each once, found 'a' twice" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    assert main([*common[:2], str(tmp_path / "other"), *common[3:], "--task", "a"]) == 2
    assert "'mine.txt', which is not a checkpoint file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(common)
