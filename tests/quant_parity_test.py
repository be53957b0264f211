"""The number formats against bitsandbytes on the CPU, where that agrees with its own CUDA code: scales, codes, packed bytes and values
of ordinary blocks. Where it does not (FP4 of -0, the dynamic map by a table of 65,536 entries), how far it may be off is said."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes would compile what it runs once
import torch  # noqa: E402

import bitsandbytes  # noqa: E402
import bitsandbytes.functional as functional  # noqa: E402

import bounds  # noqa: E402

BUILD = Path(os.environ["TRIREME_BINARY"]).parent
TYPES = {"codes": np.uint8, "nested_codes": np.uint8, "values16": np.int16, "nested_values16": np.int16}


def ours(tmp_path, form, size, values):
    """What quant_dump says of the tensor of fp32, by name."""
    values.numpy().tofile(tmp_path / "in")
    subprocess.run([BUILD / "quant_dump", form, str(size), tmp_path / "in", tmp_path / "out"], check=True)
    found = {}
    for path in tmp_path.glob("out.*"):
        name = path.suffix[1:]
        found[name] = torch.from_numpy(np.fromfile(path, TYPES.get(name, np.float32)))
        if name.endswith("16"):
            found[name] = found[name].view(torch.bfloat16)
        path.unlink()
    return found


def weights(count, seed=0):
    """As of a layer: normal, and as fine as bf16."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=generator) * 0.02).bfloat16().float()


def elements(codes):
    return torch.stack([codes >> 4, codes & 15], 1).flatten()


@pytest.mark.parametrize("size, count", [(64, 10_000_000), *((2**i, 1_000_001) for i in range(5, 13))])
def test_nf4(tmp_path, size, count):
    values = weights(count)
    codes, state = functional.quantize_4bit(values, blocksize=size, quant_type="nf4")
    mine = ours(tmp_path, "nf4", size, values)
    assert torch.equal(mine["absmax"], state.absmax)
    assert torch.equal(mine["codes"], codes.flatten())
    for dtype, name in ((torch.float32, "values"), (torch.bfloat16, "values16")):
        state.dtype, state.shape = dtype, (1, count)  # one row: theirs is wrong where rows are no multiple of the block
        assert torch.equal(mine[name], functional.dequantize_4bit(codes, state).flatten())


@pytest.mark.parametrize("size", [64, 4096])
def test_fp4(tmp_path, size):
    values = weights(size * 400)
    codes, state = functional.quantize_4bit(values, blocksize=size, quant_type="fp4")
    mine = ours(tmp_path, "fp4", size, values)
    assert torch.equal(mine["absmax"], state.absmax)
    numbers = functional.get_4bit_type("fp4", device="cpu")
    a, b = numbers[elements(mine["codes"]).long()], numbers[elements(codes.flatten()).long()]  # by value: which 0 is no matter
    x = (values.view(-1, size) / state.absmax.view(-1, 1)).flatten().double()
    tie = ((x - a).abs() - (x - b).abs()).abs() < 1e-6  # where theirs goes the other way
    assert torch.equal(a[~tie], b[~tie]) and tie[a != b].all() and (a != b).double().mean() < 1e-3
    state.dtype, state.shape = torch.bfloat16, (1, len(values))
    theirs = functional.dequantize_4bit(mine["codes"].view(-1, 1), state).flatten()
    assert torch.equal(mine["values16"], theirs)


def test_scales_in_eight_bits(tmp_path):
    values = weights(64 * 50_000)
    _, state = functional.quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=True)
    mine = ours(tmp_path, "nf4", 64, values)
    # The mean in another order of sums: 2^-24 a rounding.
    torch.testing.assert_close(mine["offset"][0], state.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(mine["nested_absmax"], state.state2.absmax, rtol=0, atol=1e-6 * state.offset.item())
    apart = (mine["nested_codes"].int() - state.absmax.int()).abs()
    assert apart.max() <= 1 and (apart != 0).double().mean() < 0.005  # 0.17 % of Gaussian values by their table
    theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    back = functional.dequantize_blockwise(mine["nested_codes"], absmax=mine["nested_absmax"], code=state.state2.code, blocksize=256) + mine["offset"]
    assert (back - theirs).abs().max() < 0.02 * state.state2.absmax.max()  # one step of the map
    blocks = (mine["nested_values16"].float().view(-1, 64).abs().amax(1), back.bfloat16().float())
    assert torch.equal(*blocks)  # each block has a value of magnitude 1


@pytest.mark.parametrize("is_signed", [True, False])
def test_dynamic_map(tmp_path, is_signed):
    values = weights(256 * 4000, seed=1)
    if not is_signed:
        values = values.abs()
    mine = ours(tmp_path, "signed" if is_signed else "unsigned", 256, values)
    code = functional.create_dynamic_map(is_signed)
    # Torch's linspace, of which theirs is made, has the last bit of some numbers by the processor.
    torch.testing.assert_close(mine["map"], code, rtol=2e-7, atol=0)
    codes, state = functional.quantize_blockwise(values, code=mine["map"], blocksize=256)
    assert torch.equal(mine["absmax"], state.absmax)
    assert (mine["codes"] != codes).double().mean() < 0.005
    # They look the nearest up in a table of 65,536 entries; ours is never farther but by rounding.
    x = (values.view(-1, 256) / state.absmax.view(-1, 1)).flatten()
    excess = (mine["map"][codes.long()] - x).abs() - (mine["map"][mine["codes"].long()] - x).abs()
    assert -1e-7 < excess.min() and excess.max() < 2 / 65536
    theirs = functional.dequantize_blockwise(mine["codes"], absmax=mine["absmax"], code=mine["map"], blocksize=256)
    assert torch.equal(mine["values"], theirs)


def test_int8_rows(tmp_path):
    values = weights(1000 * 1024, seed=2).view(1000, 1024)
    codes, stats, _ = functional.int8_vectorwise_quant(values)
    mine = ours(tmp_path, "int8", 1024, values)
    assert torch.equal(mine["absmax"], stats.flatten())
    mine_codes = mine["codes"].view(torch.int8)
    x = (values.double() * 127 / stats.view(-1, 1).double()).flatten()
    tie = ((x.abs() % 1) - 0.5).abs() < 1e-4  # where theirs divide in another order
    assert torch.equal(mine_codes[~tie], codes.flatten()[~tie]) and (mine_codes.int() - codes.flatten().int()).abs().max() <= 1
    theirs = functional.int8_vectorwise_dequant(mine_codes.view(1000, 1024), stats)
    assert torch.equal(mine["values"], theirs.flatten())
    assert torch.equal(mine["values16"], theirs.flatten().bfloat16())


@pytest.mark.parametrize("outlier, bound", [(1, bounds.LAYER_INT8), (30, bounds.LAYER_INT8_OUTLIERS)])
def test_a_layer_of_int8(tmp_path, outlier, bound):
    """bitsandbytes' layer in eval(): in train() its CPU code does not quantize inputs."""
    rows, width = 96, 256
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, width, generator=generator).clamp(-4, 4).half().float()  # float16 is what theirs takes
    x[:, 5] *= outlier
    w = torch.randn(rows, width, generator=generator) * 0.02
    for matrix in (x, w):  # where theirs divide in another order
        values = matrix.half().double()
        steps = values * 127 / values.where(values.abs() < 6, 0).abs().amax(1, keepdim=True)
        matrix[((steps.abs() % 1) - 0.5).abs() < 1e-4] = 0
    layer = bitsandbytes.nn.Linear8bitLt(width, rows, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bitsandbytes.nn.Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu").eval()
    given = x.clone().requires_grad_()
    expected = layer(given)
    mine = ours(tmp_path, "linear8", width, torch.stack([x, w]))
    y, grad = mine["y"].view(rows, rows), mine["grad"].view(rows, width)
    expected.backward(y)
    values = layer.state.CB.float() * layer.state.SCB[:, None] / 127

    def apart(found, from_what):
        return ((found - from_what).norm() / from_what.norm()).item()

    assert apart(y, expected.detach()) <= bound
    assert apart(x @ values.t(), expected.detach()) > 4 * bound  # of inputs that are not quantized
    assert apart(grad, given.grad) <= bounds.GRADIENT_FP32 < 100 * bounds.GRADIENT_FP32 < apart(y @ w, given.grad)
