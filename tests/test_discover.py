"""Finding layers in the module tree, and the inputs that they meet in a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from g3dswap.discover import find, matches, observe, patterns, why_not
from g3dswap.errors import ArgumentError, ConvertError
from g3dswap.guard import Inputs
from g3dswap.module import Grouped3D
from tests.fakes import Net

X = torch.zeros(2, 4, 5, 5, 5)


def conv(**arguments: Any) -> nn.Conv3d:
    return nn.Conv3d(4, 4, **{"kernel_size": 3, "groups": 2, **arguments})


def test_find_groups_names_of_a_shared_module() -> None:
    shared = conv()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.Conv3d(4, 4, 1), shared), "c": conv()})
    sites, skipped, known = find(model)
    assert [(site.name, site.aliases) for site in sites] == [("a", ("b.1",)), ("c", ())]
    assert not skipped and sorted(known.values()) == ["a", "c"]


def test_find_ignores_what_is_not_grouped() -> None:
    model = nn.Sequential(nn.Conv3d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose3d(4, 4, 3))
    assert find(model) == ([], [], {})


def test_root_is_a_layer() -> None:
    (site,) = find(conv())[0]
    assert site.name == "(model)" and site.names == ("",)


class MyConv(nn.Conv3d):
    pass


def weight_normed() -> nn.Module:
    return parametrizations.weight_norm(conv())


def pruned() -> nn.Module:
    return prune.l1_unstructured(conv(), "weight", 0.5)


def replaced_forward() -> nn.Module:
    layer = conv()
    layer.forward = lambda input: input  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("make", "kind", "reason"),
    [
        (lambda: MyConv(4, 4, 3, groups=2), "MyConv", "MyConv is a subclass, whose forward may do more"),
        (weight_normed, "ParametrizedConv3d", "its weight is parametrized; torch.nn.utils.parametrize"),
        (pruned, "Conv3d", "its weight is no plain parameter (weight_norm, spectral_norm or pruning"),
        (lambda: nn.LazyConv3d(4, 3, groups=2), "LazyConv3d", "it is lazy, without sizes yet; run the model"),
        (lambda: conv(dtype=torch.complex64), "Conv3d", "its dtype complex64 has no kernels (they exist for"),
        (replaced_forward, "Conv3d", "its forward is replaced on the instance"),
        (
            lambda: nn.ConvTranspose3d(4, 4, 3, groups=2, output_padding=1, dilation=2),
            "ConvTranspose3d",
            "its output_padding (1, 1, 1) reaches its stride (1, 1, 1), for which there are no kernels",
        ),
        (
            lambda: torch.ao.nn.quantized.Conv3d(4, 4, 3, groups=2),
            "Conv3d",
            "it is quantized, or prepared for quantization",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:.*[Ll]azy.*:UserWarning")
def test_skipped_with_the_reason(make: Callable[[], nn.Module], kind: str, reason: str) -> None:
    model = nn.ModuleDict({"odd": make()})
    sites, (item,), known = find(model)
    assert not sites and list(known.values()) == ["odd"]
    assert (item.name, item.kind, item.groups) == ("odd", kind, 2)
    assert item.reason.startswith(reason), item.reason


def test_hooks_are_no_reason_to_skip() -> None:
    layer = conv()
    layer.register_forward_hook(lambda *_: None)
    assert why_not(layer) is None
    assert why_not(Grouped3D.from_conv(conv(), tune="none", cache=None)) is None


def test_parametrization_that_was_removed_is_no_reason_to_skip() -> None:
    layer = weight_normed()
    parametrize.remove_parametrizations(layer, "weight")
    assert why_not(layer) is None


NAMES = ["layer1.0.conv2", "layer1.1.conv2", "layer2.0.conv2", "stem"]


def test_patterns() -> None:
    assert patterns(None, "include", NAMES) is None
    assert patterns("layer1.*", "include", NAMES) == ("layer1.*",)
    assert patterns(["stem", "layer?.0.conv2"], "exclude", NAMES) == ("stem", "layer?.0.conv2")
    assert matches(["layer1.0.conv2"], ("layer?.0.*",)) and not matches(["Stem"], ("stem",))


@pytest.mark.parametrize(
    ("value", "names", "message"),
    [
        ("layer1.0.conv", NAMES, "include='layer1.0.conv' matches no convolution with groups > 1"),
        ("layer1.0.conv", NAMES, "; did you mean 'layer1.0.conv2'"),
        ("layer1", NAMES, r"; write 'layer1.*' for the 2 inside it."),
        ("zzz", NAMES, "; there are 'layer1.0.conv2', 'layer1.1.conv2', 'layer2.0.conv2'."),
        ("zzz", [], "; the model has none."),
        ([3], NAMES, "include holds an int; it takes a qualified layer name or glob such as"),
        (7, NAMES, "include holds an int"),
    ],
)
def test_pattern_that_matches_nothing(value: Any, names: list[str], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        patterns(value, "include", names)
    assert message in str(caught.value)


def meet(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
    sites, _, _ = find(model)
    meetings = observe(model, sites, Inputs(args, kwargs)).meetings
    return {site.name: meetings[id(site.module)] for site in sites}


def test_shapes_dtypes_and_gradients() -> None:
    found = meet(Net(), torch.randn(2, 3, 4, 6, 8))
    (first,) = found["layers.0.conv2"]
    assert (first.batch, first.size, first.dtype, first.layout) == (2, (4, 6, 8), torch.float32, "contiguous")
    assert first.grad_input and first.grad_weight
    assert found["down"][0].size == (4, 6, 8)


def test_first_and_frozen_layers_need_fewer_gradients() -> None:
    model = nn.Sequential(conv(padding=1), conv(padding=1), conv(padding=1))
    model[1].requires_grad_(False)
    needs = [(item.grad_input, item.grad_weight) for (item,) in meet(model, X).values()]
    assert needs == [(False, True), (True, False), (True, True)]
    model.requires_grad_(False)
    assert all(not item.grad_input and not item.grad_weight for (item,) in meet(model, X).values())
    assert all(item.grad_input for (item,) in meet(model, X.clone().requires_grad_()).values())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradients_where_the_caller_records_none(context: Any) -> None:
    with context():
        (item,) = meet(conv(), X.clone())["(model)"]
    assert not item.grad_input and not item.grad_weight


def test_reentrant_checkpointing_hides_no_gradient() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv(padding=1), conv(padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.second, self.first(x), use_reentrant=True)

    (item,) = meet(Checkpointed(), X)["second"]
    assert item.grad_input and item.grad_weight


def test_forward_with_a_backward_inside() -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = conv()

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.layer(x).square().sum(), x, create_graph=True)[0]

    (item,) = meet(Energy(), X)["layer"]
    assert item.size == (5, 5, 5)


def test_layouts_as_pytorch_returns_them() -> None:
    last = X.to(memory_format=torch.channels_last_3d)
    assert meet(conv(), X)["(model)"][0].layout == "contiguous"
    assert meet(conv(), last)["(model)"][0].layout == "channels_last_3d"
    # Circular padding gives a contiguous tensor, so that is what the convolution sees.
    assert meet(conv(padding=1, padding_mode="circular"), last)["(model)"][0].layout == "contiguous"


def test_autocast_decides_the_dtype() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (item,) = meet(conv(), X)["(model)"]
    assert item.dtype == torch.bfloat16


def test_unbatched_and_repeated_inputs() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = conv()

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.head(x), self.head(x), self.head(input=x[:, :, :4]), self.head(x[0])]

    sizes = [(item.batch, item.size) for item in meet(Pyramid(), X)["head"]]
    assert sizes == [(2, (5, 5, 5)), (2, (4, 5, 5)), (1, (5, 5, 5))]


def test_hook_of_the_user_that_changes_the_input_comes_first() -> None:
    layer = conv()
    layer.register_forward_pre_hook(lambda module, args: (args[0][:, :, :3],))
    assert meet(layer, X)["(model)"][0].size == (3, 5, 5)


def test_other_device_is_said() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = conv(device="meta")

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("Expected all tensors to be on the same device")

    model = Fails()
    with pytest.raises(ConvertError, match="the inputs are on cpu, the model on meta; move the inputs"):
        observe(model, find(model)[0], Inputs((X,), {}))
