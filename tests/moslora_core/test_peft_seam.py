"""The internals of PEFT that this package relies on: a version that changes one fails here, under its name.

See the table in ``moslora_core/peft_seam.py``.
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import textwrap
from pathlib import Path

import peft
import peft.tuners.lora
import pytest
import torch
from peft import LoraConfig, LoraModel, PeftType, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from moslora_core import MOSLORA, MoSLoraConfig, MoSLoraModel, peft_seam

LORA_FOLDER = Path(inspect.getfile(peft.tuners.lora)).parent


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def tree(thing) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(thing)))


# ------------------------------------------------------------------------------------------------------------ the type


def test_peft_type_is_an_enum_of_strings():
    assert issubclass(PeftType, str) and issubclass(PeftType, enum.Enum)


def test_moslora_is_a_member_like_the_others():
    assert PeftType["MOSLORA"] is PeftType("MOSLORA") is PeftType.MOSLORA is MOSLORA
    assert MOSLORA in list(PeftType)
    assert MOSLORA == "MOSLORA"
    assert {MOSLORA: 1}[PeftType("MOSLORA")] == 1
    assert repr(MOSLORA) == repr(PeftType.LORA).replace("LORA", "MOSLORA")
    with pytest.raises(ValueError):
        PeftType("NOSUCHLORA")


def test_mappings_take_the_type():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[MOSLORA] is MoSLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[MOSLORA] is MoSLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[MOSLORA] == PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORA] == "lora_"


def test_registering_twice_changes_nothing():
    before = (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING))
    assert peft_seam._add_peft_type("MOSLORA") is MOSLORA
    peft_seam.register(MoSLoraConfig, MoSLoraModel)
    assert (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)) == before


# ----------------------------------------------------------------------------------------------------------- the tuner


def test_create_and_replace_has_its_arguments():
    expected = ["lora_config", "adapter_name", "target", "target_name", "parent", "current_key"]
    assert parameters(LoraModel._create_and_replace)[:6] == expected


def test_create_and_replace_puts_the_layer_under_its_parent():
    """It is fetched from there: the method returns nothing."""
    seen = {}

    class Watching(LoraModel):
        def _create_and_replace(self, config, adapter, target, target_name, parent, current_key, **kwargs):
            assert (
                super()._create_and_replace(config, adapter, target, target_name, parent, current_key, **kwargs)
                is None
            )
            seen[current_key] = getattr(parent, target_name)

    model = nn.Sequential(nn.Linear(2, 3))
    Watching(model, LoraConfig(target_modules=["0"]), "default")
    assert isinstance(seen["0"], LoraLayer)
    assert model[0] is seen["0"]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("_check_new_adapter_config", ["config"]),
        ("inject_adapter", ["model", "adapter_name"]),
        ("add_weighted_adapter", ["adapters", "weights", "adapter_name", "combination_type"]),
        ("subtract_mutated_init", ["output_state_dict", "adapter_name", "kwargs"]),
    ],
)
def test_overridden_methods_have_their_arguments(name, expected):
    assert parameters(getattr(LoraModel, name))[: len(expected)] == expected


@pytest.mark.parametrize("name", ["_get_adapter_state_dict", "_remap_adapter_state_dict_for_load"])
def test_what_lora_saves_is_said_by_its_tuner(name):
    """Where the type LORA is asked for instead, biases and DoRA's magnitudes of other types are lost."""
    assert isinstance(vars(LoraModel)[name], classmethod)


def test_adapted_modules_are_known_by_name():
    model = get_peft_model(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)), LoraConfig(target_modules=["0"]))
    assert list(model.base_model.targeted_module_names) == ["0"]


def test_add_weighted_adapter_copies_the_first_configuration():
    """Which therefore is the one that is made plain while it runs."""
    source = inspect.getsource(LoraModel.add_weighted_adapter)
    assert "self.peft_config[adapter_name] = replace(\n            self.peft_config[adapters[0]]," in source
    assert "initial" in inspect.getsource(LoraModel._convert_state_dict_for_initial_model)
    assert "base_model.subtract_mutated_init(" in inspect.getsource(LoraModel._convert_state_dict_for_initial_model)


# ---------------------------------------------------------------------------------------------------------- the layers


def lora(module: nn.Module) -> LoraLayer:
    net = nn.Sequential()
    net.add_module("layer", module)
    return get_peft_model(net, LoraConfig(r=4, target_modules=["layer"])).base_model.model.layer


def test_adapter_containers():
    names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    assert set(names) <= set(LoraLayer.adapter_layer_names)
    layer = lora(nn.Linear(3, 2))
    assert type(layer.lora_A) is type(layer.lora_B) is nn.ModuleDict
    embedding = lora(nn.Embedding(3, 2))
    assert type(embedding.lora_embedding_A) is type(embedding.lora_embedding_B) is nn.ParameterDict


@pytest.mark.parametrize(
    "module, b_type",
    [
        (nn.Linear(3, 2), nn.Linear),
        (nn.Conv1d(3, 2, 3), nn.Conv1d),
        (nn.Conv2d(3, 2, 3), nn.Conv2d),
        (nn.Conv3d(3, 2, 3), nn.Conv3d),
        (nn.MultiheadAttention(4, 2), nn.Linear),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_b_is_a_module_of_torch_with_one_weight(module, b_type):
    B = lora(module).lora_B["default"]
    assert type(B) is b_type
    assert [name for name, _ in B.named_parameters()] == ["weight"]
    assert B.weight.shape[1] == 4
    assert all(size == 1 for size in B.weight.shape[2:])


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer")
def test_grouped_convolutions_group_b_and_not_a():
    layer = lora(nn.Conv2d(4, 6, 3, groups=2))
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    assert (A.groups, tuple(A.weight.shape)) == (1, (4, 4, 3, 3))
    assert (B.groups, tuple(B.weight.shape)) == (2, (6, 2, 1, 1))


def test_embeddings_store_b_as_out_by_r():
    layer = lora(nn.Embedding(5, 6))
    assert tuple(layer.lora_embedding_B["default"].shape) == (6, 4)
    assert tuple(layer.lora_embedding_A["default"].shape) == (4, 5)


@pytest.mark.parametrize("name", ["forward", "_mixed_batch_forward", "get_delta_weight"])
def test_embedding_methods_can_run_on_a_view_of_the_layer(name):
    method = getattr(lora_layer.Embedding, name)
    names = [node.id for node in ast.walk(tree(method)) if isinstance(node, ast.Name)]
    assert "super" not in names, f"Embedding.{name} calls super(), which needs the layer itself"
    assert "self.lora_embedding_B[" in inspect.getsource(method)
    assigned = [
        target.attr
        for node in ast.walk(tree(method))
        if isinstance(node, (ast.Assign, ast.AugAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute)
    ]
    assert not assigned, f"Embedding.{name} sets {assigned} on the layer, which a view would swallow"


def test_no_other_method_of_embedding_reads_b_after_creation():
    readers = {
        name
        for name, method in vars(lora_layer.Embedding).items()
        if inspect.isfunction(method) and "lora_embedding_B" in inspect.getsource(method)
    }
    assert readers == {"update_layer", "mica_init", "get_delta_weight", "_mixed_batch_forward", "forward"}


def test_the_output_projection_of_attention_is_a_layer_of_its_own():
    layer = lora(nn.MultiheadAttention(4, 2))
    assert type(layer.base_layer.out_proj) is lora_layer.Linear
    assert "default" in layer.base_layer.out_proj.lora_B


def test_set_adapter_toggles_items():
    """Frozen mixers of embeddings are kept out of ``items()`` for that reason."""
    source = inspect.getsource(LoraLayer.set_adapter)
    assert "for key, layer in module_dict.items():" in source
    assert "for key, layer in module_dict.items():" in inspect.getsource(LoraLayer.set_requires_grad)


def test_torch_parameter_dicts_keep_their_keys_apart():
    """``MixerDict`` registers buffers under keys of a ``ParameterDict``."""
    container = nn.ParameterDict({"a": torch.zeros(1)})
    assert dict(container._keys) == {"a": None}
    assert "a" in container._parameters


# ----------------------------------------------------------------------------------------------------------- the kinds


def class_in_file(module: str, name: str) -> ast.ClassDef:
    """Found in the source: most quantised layers are defined only where their library is installed."""
    parsed = ast.parse((LORA_FOLDER / f"{module}.py").read_text(encoding="utf-8"))
    found = [node for node in ast.walk(parsed) if isinstance(node, ast.ClassDef) and node.name == name]
    assert found, f"peft.tuners.lora.{module}.{name} is gone"
    return found[0]


# The methods that write to weights while an adapter is made, before its mixer is.
CREATION = {"update_layer", "mica_init"}


@pytest.mark.parametrize("module, name", sorted(peft_seam.LORA_LAYERS), ids="-".join)
def test_layers_use_b_as_a_module_and_do_not_write_to_it(module, name):
    for method in class_in_file(module, name).body:
        if not isinstance(method, ast.FunctionDef) or method.name in CREATION:
            continue
        for node in ast.walk(method):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets if isinstance(node, (ast.Assign, ast.AugAssign)) else []:
                text = ast.unparse(target)
                # In half precision on the CPU, what was read is written back: that changes nothing.
                written_back = text.endswith(".weight.data") and ".to(dtype)" in ast.unparse(node.value)
                assert "lora_B" not in text or written_back or text == "lora_B", f"{name}.{method.name}: {text}"


def test_every_layer_of_peft_is_decided():
    found = set()
    for path in LORA_FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
                if bases & {"LoraLayer", "Linear", "_ConvNd"} and "LoraVariant" not in bases:
                    found.add((path.stem, node.name))
    found -= {("layer", "_ConvNd"), ("arrow", "ArrowLoraLinearLayer"), ("variants", "BlockDiagonalLinear")}
    assert found == set(peft_seam.LORA_LAYERS) | set(peft_seam.REFUSED_LAYERS)


def test_kind_of_a_layer():
    assert peft_seam.layer_kind(lora(nn.Linear(2, 3))) == ("layer", "Linear")
    assert peft_seam.layer_kind(lora(nn.Embedding(2, 3))) == ("layer", "Embedding")
    importlib.import_module("peft.tuners.lora.gptq")


def test_every_name_imported_from_peft_is_listed_here():
    """Other modules take PEFT's internals from the seam, and from PEFT itself only what it exports."""
    package = Path(peft_seam.__file__).parent
    for module in ("config", "mixer", "layers", "model", "__init__"):
        for node in ast.walk(ast.parse((package / f"{module}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft"):
                assert node.level or node.module == "peft", f"{module}.py imports from {node.module}"
                assert node.level or all(hasattr(peft, alias.name) for alias in node.names)
