"""Batch norms folded while training: at 32 bits nothing changes, afterwards nothing changes either."""

import pytest
import torch
from torch import nn

from micronet.models.build import ModelSpec, build_model
from micronet.quantization.calibrate import calibrate, frozen, observing
from micronet.quantization.config import QuantConfig
from micronet.quantization.fold import fold_model
from micronet.quantization.fold import restore as restore_fold
from micronet.quantization.functional import dequantize
from micronet.quantization.layers import effective_weight, quantized
from micronet.quantization.quantize import quantize_model, restore

IMAGES = torch.randn(8, 3, 32, 32)


@pytest.mark.parametrize("size", [2, 8, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_in_32_bits_it_is_a_convolution_and_a_batch_norm(size, bias):
    """T18: output, gradients and running statistics, from the first batch on and with gains of every sign."""
    conv, norm = nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d(6)
    nn.init.normal_(norm.weight)
    norm.weight.data[0] = 0
    plain = nn.Sequential(nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d(6))
    plain[0].load_state_dict(conv.state_dict())
    plain[1].load_state_dict(norm.state_dict())
    conv = quantized(conv)
    conv.norm = norm
    for _ in range(3):
        x = torch.randn(size, 3, 6, 6)
        outputs = conv(x), plain(x)
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        upstream = torch.randn_like(outputs[0])
        gradients = [
            torch.autograd.grad((out * upstream).sum(), [w, g, b])
            for out, w, g, b in (
                (outputs[0], conv.weight, norm.weight, norm.bias),
                (outputs[1], plain[0].weight, plain[1].weight, plain[1].bias),
            )
        ]
        for left, right in zip(*gradients, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(norm.running_mean, plain[1].running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var, plain[1].running_var, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(conv.eval()(x), plain.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["iao", "lsq", "dorefa"])
@pytest.mark.parametrize("level", ["channel", "layer"])
def test_a_network_trains_folds_and_reloads(method, level):
    config = QuantConfig(method=method, q_level=level, bn_fuse=True)
    model, record = quantize_model(build_model(ModelSpec("nin", {"width": 0.1})), config)
    assert not any(isinstance(module, nn.BatchNorm2d) and ".norm" not in name for name, module in model.named_modules())
    calibrate(model, [IMAGES])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with observing(model):
        for _ in range(3):
            model.train()(IMAGES).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    again = restore(build_model(ModelSpec("nin", {"width": 0.1})), record)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(IMAGES), model.eval()(IMAGES))
    folded, fusion = fold_model(model, [record])
    for name in record.result["fused"]:
        before, after = model.get_submodule(name[0]), folded.get_submodule(name[0])
        quantizer, weight = before.weight_quantizer, effective_weight(before)
        on_grid = dequantize(quantizer.integers(weight), quantizer.qparams(weight))
        torch.testing.assert_close(after.weight, on_grid, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(after.weight_quantizer(after.weight), on_grid, rtol=1e-6, atol=1e-8)
    error = (folded(IMAGES) - model(IMAGES)).norm() / model(IMAGES).norm()
    assert error < 0.05  # biases have moved to their integer grid, which is coarse where DoReFa's clip is wide
    reloaded = restore_fold(restore(build_model(ModelSpec("nin", {"width": 0.1})), record), fusion)
    reloaded.load_state_dict(folded.state_dict())
    assert torch.equal(reloaded.eval()(IMAGES), folded.eval()(IMAGES))


def test_frozen_it_trains_what_the_integer_network_computes():
    """QAFT: ranges and statistics stay; output is that of eval mode."""
    model, _ = quantize_model(build_model(ModelSpec("nin", {"width": 0.1})), QuantConfig(bn_fuse=True))
    calibrate(model, [IMAGES])
    before = {
        name: value.clone() for name, value in model.state_dict().items() if "quantizer" in name or "running" in name
    }
    expected = model.eval()(IMAGES)
    model.train()
    with frozen(model):
        out = model(IMAGES)
        out.sum().backward()
    torch.testing.assert_close(out, expected)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.endswith(("frozen", "fixed")))
    assert model.features[0].conv.weight.grad.abs().sum() > 0


def test_commands_chain(micronet, chain, tmp_path):
    few = ["--epochs", 1, "--limit", 160]
    files = [tmp_path / name for name in ("q.safetensors", "f.safetensors", "q.onnx")]
    assert micronet("quantize", chain / "float.safetensors", "--bn-fuse", *few, "-o", files[0]).code == 0
    assert micronet("bn-fuse", files[0], "-o", files[1]).code == 0
    done = micronet("export-onnx", files[1], "-o", files[2])
    assert done.code == 0, done.err
    rows = micronet("compare", *files, "--json").json["rows"]
    assert rows[2]["size_bytes"] < (chain / "float.onnx").stat().st_size * 0.6
    assert rows[1]["agreement"] > 0.9
