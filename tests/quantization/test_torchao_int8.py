"""`SummedInt8Tensor`: torchao's results to the bit, and no sum of a weight at a call."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from lib.toys import make, noise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8Tensor, PerRow, PerTensor, quantize_
from torchao.quantization.quant_primitives import MappingType

import cachedit_fx
from cachedit_fx.quantization.torchao_int8 import SummedInt8Tensor, _multiplies_unsigned, with_sums, without_sums

pytestmark = pytest.mark.filterwarnings("ignore:.*gains no time")


class Sums(TorchDispatchMode):
    """Counts the sums over int8 tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.sum.dim_IntList and args[0].dtype is torch.int8
        return func(*args, **kwargs or {})


def layer(granularity=None, bias=True, dtype=torch.float32, **settings) -> Any:
    """A layer that torchao quantized."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias, dtype=dtype).requires_grad_(False)
    granularity = granularity or PerRow()
    config = Int8DynamicActivationInt8WeightConfig(granularity=granularity, set_inductor_config=False, **settings)
    quantize_(linear, config)
    return linear


def summed(linear: nn.Linear) -> Any:
    twin = copy.deepcopy(linear)
    twin.weight = nn.Parameter(with_sums(linear.weight.data), requires_grad=False)
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("granularity", [PerRow(), PerTensor(), [PerTensor(), PerRow()]], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_results_are_those_of_torchao(dtype, granularity, bias):
    plain = layer(granularity, bias, dtype)
    twin = summed(plain)
    assert type(twin.weight.data) is SummedInt8Tensor
    for shape in ((96,), (1, 96), (2, 17, 96)):
        x = 50 * torch.randn(shape, dtype=dtype)
        if len(shape) == 3:
            x[0, :3, 0] = torch.tensor([float("inf"), float("nan"), 6e4])
        torch.testing.assert_close(twin(x), plain(x), rtol=0, atol=0, equal_nan=True)


def test_compiled_results_are_those_of_torchao():
    plain, x = layer(), torch.randn(2, 17, 96)
    assert torch.equal(torch.compile(summed(plain), backend="aot_eager")(x), plain(x))


def test_no_weight_is_summed_at_a_call():
    plain = layer()
    twin = summed(plain)
    for linear, count in ((plain, int(_multiplies_unsigned())), (twin, 0)):
        with Sums() as sums:
            linear(torch.ones(3, 96))
        assert sums.count == count


def test_signed_numbers_give_the_same_product(monkeypatch):
    twin, x = summed(layer()), torch.randn(5, 96)
    expected, is_unsigned = twin(x), _multiplies_unsigned()
    monkeypatch.setattr("cachedit_fx.quantization.torchao_int8._multiplies_unsigned", lambda: not is_unsigned)
    assert torch.equal(twin(x), expected)


def test_dynamo_traces_a_length_that_depends_on_data():
    twin, x, mask = summed(layer()), torch.randn(9, 96), torch.arange(9) < 5
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda x, mask: twin(x[mask][None]), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, mask), twin(x[mask][None]))


def test_quantize_makes_them_and_other_kinds_stay():
    model = make(width=32)
    cachedit_fx.quantize(model, "int8", per_layer={"blocks.1": "int8_weight_only"})
    classes = {type(block.up.weight.data) for block in model.blocks}
    assert classes == {SummedInt8Tensor, Int8Tensor}
    arguments = [noise(width=32), torch.tensor([500.0]), noise(1, 3, width=32)]
    expected = model(*arguments)
    for child in model.modules():
        if isinstance(child, nn.Linear):
            child.weight = nn.Parameter(without_sums(child.weight.data), requires_grad=False)
    assert torch.equal(model(*arguments), expected)


@pytest.mark.parametrize("settings", [{"act_mapping_type": MappingType.ASYMMETRIC}], ids=["asymmetric activations"])
def test_weights_that_the_product_does_not_fit_stay_as_they_are(settings):
    weight = layer(**settings).weight.data
    assert with_sums(weight) is weight


def test_copies_and_parts_keep_their_results():
    plain, x = layer(), torch.randn(5, 96)
    twin = summed(plain)
    for other in (copy.deepcopy(twin), twin.to(torch.device("cpu"))):
        assert type(other.weight.data) is SummedInt8Tensor
        assert torch.equal(other(x), plain(x))
    rows = twin.weight.data[:8]
    assert torch.equal(nn.functional.linear(x, rows), nn.functional.linear(x, plain.weight)[:, :8])


def test_state_dicts_are_exchanged_with_torchao():
    plain, x = layer(), torch.randn(5, 96)
    twin = summed(plain)
    for value, target in ((plain, summed(layer(bias=True))), (twin, layer())):
        with torch.no_grad():
            target.weight.qdata.zero_()
        file = io.BytesIO()
        torch.save(value.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(target(x), plain(x))


def test_no_gradient_goes_through_the_rounding():
    plain, x = layer(), torch.randn(5, 96, requires_grad=True)
    assert not plain(x).requires_grad and not summed(plain)(x).requires_grad


def test_a_write_to_rows_keeps_the_sums():
    first, second, x = layer(), layer(), torch.randn(5, 96)
    other = nn.Linear(96, 40).requires_grad_(False)
    quantize_(other, Int8DynamicActivationInt8WeightConfig(granularity=PerRow(), set_inductor_config=False))
    twin, source = summed(second), summed(other)
    first.weight.data[2:5].copy_(other.weight.data[2:5])
    twin.weight.data[2:5].copy_(source.weight.data[2:5])
    assert torch.equal(twin(x), first(x))


def test_state_dicts_in_memory():
    plain, x = layer(), torch.randn(5, 96)
    other = nn.Linear(96, 40).requires_grad_(False)
    quantize_(other, Int8DynamicActivationInt8WeightConfig(granularity=PerRow(), set_inductor_config=False))
    other.load_state_dict(summed(plain).state_dict())
    assert type(other.weight.data) is Int8Tensor and torch.equal(other(x), plain(x))


def test_accelerate_offloads_it_as_torchaos_class():
    accelerate = pytest.importorskip("accelerate")
    twin, x = summed(layer()), torch.randn(5, 96)
    expected = twin(x)
    accelerate.cpu_offload(twin, execution_device=torch.device("cpu"))
    assert torch.equal(twin(x), expected)
