"""The fused training pass against PEFT's operations on the same layer, and when the layer takes which."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from moslora_core import MoSLoraConfig
from moslora_core.fused import fused_linear, keep_mask
from moslora_core.layers import FusedLinear

IN, OUT, R = 6, 5, 4


def adapted(dtype: torch.dtype = torch.float64, **settings) -> tuple[nn.Module, FusedLinear]:
    """A model of one adapted layer in training, none of whose factors is zero, and the layer."""
    torch.manual_seed(0)
    settings = {"r": R, "lora_alpha": 7, "target_modules": ["0"]} | settings
    model = get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), MoSLoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.to(dtype).train()
    (layer,) = (module for module in model.modules() if isinstance(module, Linear))
    return model, layer


def batch(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, IN, dtype=dtype, requires_grad=True)


def gradients(y: torch.Tensor, x: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    found = torch.autograd.grad((y * weight).sum(), [x, *named.values()])
    return dict(zip(["x", *named], found, strict=True))


def pefts(layer: FusedLinear, x: torch.Tensor) -> torch.Tensor:
    return Linear.forward(layer, x)


# ------------------------------------------------------------------------------------------------------- the function


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=3), st.booleans(), st.sampled_from(["learned", "frozen"]))
def test_outputs_and_gradients_are_pefts(shape, bias, mixer):
    model, layer = adapted(mixer=mixer, mixer_init="orthogonal")
    if not bias:
        layer.base_layer.bias = None
    x = batch(*shape)
    assert layer.fusable_adapter(x) == "default"
    y, expected = layer(x), pefts(layer, x)
    torch.testing.assert_close(y, expected)
    found, wanted = gradients(y, x, model), gradients(expected, x, model)
    assert found.keys() == wanted.keys() and any("mixer" in name for name in found) == (mixer == "learned")
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], msg=name)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 0.9), st.integers(0, 2**31))
def test_dropout_is_the_mask_on_the_input_of_a(p, seed):
    model, layer = adapted(lora_dropout=p)
    x = batch(3, 2)
    torch.manual_seed(seed)
    y = layer(x)
    torch.manual_seed(seed)
    mask, kept = keep_mask(x, p)
    A, B, M = layer.lora_A["default"].weight, layer.lora_B["default"].raw, layer.lora_B["default"].mixer
    expected = layer.base_layer(x) + layer.scaling["default"] * (x * mask / kept) @ A.T @ M.T @ B.T
    torch.testing.assert_close(y, expected)
    found, wanted = gradients(y, x, model), gradients(expected, x, model)
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], msg=name)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
def test_the_mask_keeps_its_share(p):
    torch.manual_seed(0)
    x = torch.zeros(3, 333_331)
    mask, kept = keep_mask(x, p)
    assert mask.shape == x.shape and mask.dtype == torch.uint8 and mask.max() == 1
    assert kept == pytest.approx(1 - p, abs=2**-17)
    share, sd = mask.double().mean(), (kept * (1 - kept) / x.numel()) ** 0.5
    assert abs(share - kept) < 5 * sd
    # Four elements come from one draw: neighbours at each distance up to it are independent all the same.
    flat = mask.flatten().double() - kept
    for distance in range(1, 5):
        assert abs((flat[distance:] * flat[:-distance]).mean()) < 5 * kept * (1 - kept) / len(flat) ** 0.5


def test_a_share_that_rounds_to_all_drops_nothing_and_none_drops_all():
    x = torch.ones(8)
    assert keep_mask(x, 2**-18) == (None, 1.0)
    assert keep_mask(x, 1 - 2**-20)[1] == 2**-16


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_second_derivatives(p):
    torch.manual_seed(0)
    shapes = {"x": (3, IN), "A": (R, IN), "B": (OUT, R), "M": (R, R)}
    x, A, B, M = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values())
    W, bias = torch.randn(OUT, IN, dtype=torch.float64), torch.randn(OUT, dtype=torch.float64)

    def function(x, A, B, M):
        torch.manual_seed(1)  # one mask for all differences
        return fused_linear(x, W, bias, A, B, M, scaling=0.7, p=p)

    assert torch.autograd.gradcheck(function, (x, A, B, M))
    assert torch.autograd.gradgradcheck(function, (x, A, B, M))


def test_autocast_gives_its_dtype_and_gradients_of_the_parameters():
    model, layer = adapted(torch.float32)
    x = batch(64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.fusable_adapter(x) == "default"
        y, expected = layer(x), pefts(layer, x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.3)
    found, exact = gradients(y.float(), x, model), gradients(pefts(layer, x), x, model)
    for name in found:
        assert found[name].dtype == torch.float32
        assert (found[name] - exact[name]).norm() < 0.02 * exact[name].norm(), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_mask_again(reentrant):
    model, layer = adapted(lora_dropout=0.5)
    x = batch(7)
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        model.zero_grad()
        torch.manual_seed(3)
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("p", "first"), [(0.0, False), (0.1, False), (0.0, True)])
@pytest.mark.parametrize("autocast", [False, True])
def test_keeps_less_for_the_backward_pass_than_peft(p, first, autocast):
    """Also a first layer, whose input needs no gradient and whose W then nobody needs."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(256, 256)), MoSLoraConfig(r=R, lora_dropout=p, target_modules=["0"])
    )
    layer, x = model.base_model.model[0].train(), torch.randn(1000, 256, requires_grad=not first)

    def kept(forward) -> int:
        storages = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage  # held, or its address is given to another
            return tensor

        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            forward(x)
        return sum(storage.nbytes() for storage in storages.values())

    ours, theirs = kept(layer), kept(lambda x: pefts(layer, x))
    assert ours < (0.7 if p else 1.01) * theirs


# ------------------------------------------------------------------------------------------------------ who takes it


def _hook(*arguments):
    return None


FALLS_BACK = {
    "evaluation": lambda model, layer: model.eval(),
    "disabled": lambda model, layer: layer.enable_adapters(False),
    "merged": lambda model, layer: layer.merge(),
    "training base": lambda model, layer: layer.base_layer.weight.requires_grad_(True),
    "training bias of the base": lambda model, layer: layer.base_layer.bias.requires_grad_(True),
    "second adapter": lambda model, layer: (
        model.add_adapter("second", MoSLoraConfig(r=2, target_modules=["0"])),
        model.base_model.set_adapter(["default", "second"]),
        model.double(),
    ),
    "no adapter": lambda model, layer: layer.set_adapter([]),
    "hook on the base": lambda model, layer: layer.base_layer.register_forward_hook(_hook),
    "hook on A": lambda model, layer: layer.lora_A["default"].register_forward_pre_hook(_hook),
    "hook on B": lambda model, layer: layer.lora_B["default"].register_full_backward_hook(_hook),
    "hook on dropout": lambda model, layer: layer.lora_dropout["default"].register_forward_hook(_hook),
    "own forward": lambda model, layer: setattr(layer.base_layer, "forward", layer.base_layer.forward),
    "mixed dtypes": lambda model, layer: layer.lora_A.float(),
    "partitioned": lambda model, layer: setattr(layer.lora_B["default"].raw, "ds_id", 0),
    "subclass of a tensor": lambda model, layer: setattr(
        layer.base_layer, "weight", nn.Parameter(layer.base_layer.weight.as_subclass(_Tensor), requires_grad=False)
    ),
    "all dropped": lambda model, layer: layer.lora_dropout.update({"default": nn.Dropout(1.0)}),
    "another dropout": lambda model, layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.5)}),
}


class _Tensor(torch.Tensor):
    pass


@pytest.mark.parametrize("change", FALLS_BACK.values(), ids=FALLS_BACK)
def test_everything_else_goes_pefts_way(change):
    model, layer = adapted()
    x = batch(2)
    assert layer.fusable_adapter(x) == "default"
    change(model, layer)
    assert layer.fusable_adapter(x) is None


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_bias": True}, {"mixer": "identity"}], ids=lambda entry: next(iter(entry))
)
def test_adapters_that_are_more_or_less_go_pefts_way(settings):
    _, layer = adapted(**settings)
    x = batch(2)
    assert not isinstance(layer, FusedLinear) or layer.fusable_adapter(x) is None
    layer(x).sum().backward()


def test_mixed_batches_go_pefts_way():
    _, layer = adapted()
    x = batch(2)
    assert torch.equal(layer(x, adapter_names=["__base__"] * 2), layer.base_layer(x))


def test_transforms_of_functions_look_into_pefts_operations():
    _, layer = adapted()
    x = batch(3).detach()
    jacobian = torch.func.vmap(torch.func.jacrev(layer))(x)
    weight = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(jacobian, weight.expand(3, OUT, IN))
    _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, weight.sum(1).expand(3, OUT))
    with forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(x, torch.ones_like(x)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)


def test_inference_in_training_mode_gives_the_bits_of_the_folded_adapter():
    _, layer = adapted(torch.float32)
    x = batch(5, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(layer(x), pefts(layer, x))


def test_convolutions_and_conv1d_keep_pefts_class():
    model = get_peft_model(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(2, 2)), MoSLoraConfig(r=2, target_modules=["0", "1"])
    )
    kinds = [type(module).__name__ for module in model.modules() if hasattr(module, "lora_A")]
    assert kinds == ["Conv2d", "FusedLinear"]
    assert isinstance(copy.deepcopy(model).base_model.model[1], FusedLinear)


def test_shapes_on_the_meta_device():
    model, layer = adapted(torch.float32, lora_dropout=0.5)
    model.to("meta")
    x = torch.empty(2, IN, device="meta", requires_grad=True)
    assert layer.fusable_adapter(x) == "default"
    assert layer(x).shape == (2, OUT) and gradients(layer(x), x, model)["x"].shape == (2, IN)
