#!/usr/bin/env python
"""Post-training quantization at few bits: how close the ways to do it come to the float network.

    python scripts/bench_ptq.py ARTIFACT [--data DATA] [--image-size N] [--bits W4A8 ...] [--ways NAME ...]

Each way starts from the same calibration images and activation statistics. Printed for the test images: the share whose
first class is the float network's, the signal-to-noise ratio of the outputs, the accuracy if there are labels, and the
seconds it took. ``nncf`` and ``brevitas`` are measured where they are installed. Prints a Markdown table for
BENCHMARKS.md.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from micronet.artifact.artifact import load, versions
from micronet.core.machine import tune_allocator
from micronet.data.batches import eval_batches
from micronet.data.split import random_subset
from micronet.models.device import describe_machine
from micronet.models.modes import copy_model
from micronet.quantization.calibrate import collect, set_ranges
from micronet.quantization.config import QuantConfig, RangeConfig
from micronet.quantization.quantize import quantize_model
from micronet.quantization.reconstruct import reconstruct
from micronet.quantization.recovery import correct_biases
from micronet.quantization.weight_scales import search_weight_scales
from micronet.stages.config import DataConfig
from micronet.stages.inputs import calibration_batches, open_data

Recover = Callable[[nn.Module, nn.Module, list[Tensor]], object]
WAYS: dict[str, tuple[Recover, ...]] = {
    "plain": (),
    "bias-correct": (correct_biases,),
    "seq-mse": (search_weight_scales,),
    "layer": (lambda *given: reconstruct(*given, "layer"),),
    "block": (lambda *given: reconstruct(*given, "block"),),
    "seq-mse+layer": (search_weight_scales, lambda *given: reconstruct(*given, "layer")),
    "seq-mse+block": (search_weight_scales, lambda *given: reconstruct(*given, "block")),
}


def nncf_network(model: nn.Module, batches: list[Tensor], w_bits: int, a_bits: int) -> nn.Module:
    """Return the network that NNCF's post-training quantization makes, first and last layer included."""
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

    parameters = AdvancedQuantizationParameters(
        weights_quantization_params=QuantizationParameters(num_bits=w_bits, per_channel=True),
        activations_quantization_params=QuantizationParameters(num_bits=a_bits, per_channel=False),
    )
    data = nncf.Dataset([batch[i : i + 1] for batch in batches for i in range(len(batch))])
    made: nn.Module = nncf.quantize(
        copy_model(model),
        data,
        subset_size=sum(map(len, batches)),
        advanced_parameters=parameters,
    )
    return made


def brevitas_network(model: nn.Module, batches: list[Tensor], w_bits: int, a_bits: int) -> nn.Module:
    """Return the network that Brevitas's post-training quantization makes: equalization, GPTQ, corrected biases.

    The images, and weights of the first layer and of the last, have at least 8 bits, as in the other ways.
    """
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
    from brevitas.graph.gptq import gptq_mode
    from brevitas.graph.quantize import (
        COMPUTE_LAYER_MAP,
        QUANT_ACT_MAP,
        QUANT_IDENTITY_MAP,
        preprocess_for_quantize,
        quantize,
    )
    from brevitas.inject import value
    from brevitas.nn import QuantIdentity
    from brevitas.quant import Int8WeightPerChannelFloatMSE

    network = preprocess_for_quantize(copy_model(model).eval(), equalize_iters=20)
    layers = [module for module in network.modules() if type(module) in (nn.Conv2d, nn.Linear)]
    shapes = {layer.weight.shape for layer in (layers[0], layers[-1])}

    @value  # Brevitas calls it with each layer
    def bits(module: Any) -> int:
        return max(8, w_bits) if module.weight.shape in shapes else w_bits

    compute = dict(COMPUTE_LAYER_MAP)
    for kind in (nn.Conv2d, nn.Linear):
        made, options = compute[kind]
        compute[kind] = (made, {**options, "weight_quant": Int8WeightPerChannelFloatMSE, "weight_bit_width": bits})
    activations, edges = (
        {kind: found and (found[0], {**found[1], **_least_error(found[1], a_bits)}) for kind, found in given.items()}
        for given in (QUANT_ACT_MAP, QUANT_IDENTITY_MAP)
    )
    quantized: Any = quantize(network, edges, compute, activations)
    for node in quantized.graph.nodes:
        if node.op == "placeholder":
            first = next(iter(node.users)).target
            quantized.set_submodule(first, QuantIdentity(bit_width=max(8, a_bits), return_quant_tensor=True))
    quantized.eval()
    with torch.no_grad():
        with calibration_mode(quantized):
            for batch in batches:
                quantized(batch)
        quantized(batches[0])  # sets the scales of weights
        with gptq_mode(quantized, use_quant_activations=False) as gptq:
            for _ in range(gptq.num_layers):
                for batch in batches:
                    gptq.model(batch)
                gptq.update()
        with bias_correction_mode(quantized):
            for batch in batches:
                quantized(batch)
    return quantized  # type: ignore[no-any-return]


def _least_error(options: dict[str, Any], bits: int) -> dict[str, Any]:
    """Return an activation's options with a number of bits and, if possible, scales of least squared error."""
    import brevitas.quant

    given = options["act_quant"]

    return {"bit_width": bits, "act_quant": getattr(brevitas.quant, f"{given.__name__}MSE", given)}


OTHERS = {"nncf": nncf_network, "brevitas": brevitas_network}


@torch.no_grad()
def outputs(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """Return the outputs for all batches."""
    return torch.cat([model.eval()(batch) for batch in batches])


def row(name: str, seconds: float, out: Tensor, reference: Tensor, labels: Tensor | None) -> str:
    """Return a row of the table."""
    same = (out.argmax(1) == reference.argmax(1)).double().mean()
    noise = (out - reference).double().square().sum()
    decibels = 10 * (reference.double().square().sum() / noise).log10()
    right = "" if labels is None else f"{(out.argmax(1) == labels).double().mean():.2%}"
    return f"| {name} | {same:.2%} | {decibels:.1f} | {right} | {seconds:.0f} |"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--model", help="the factory, to confirm that its code may run")
    parser.add_argument("--data")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--unlabelled", action="store_true", help="the labels are not the network's classes")
    parser.add_argument("--bits", nargs="*", default=["W4A8", "W4A4", "W3A8"])
    parser.add_argument("--ways", nargs="*", default=[*WAYS, *OTHERS])
    parser.add_argument("--calib-batches", type=int, default=16, help="of 64 images")
    parser.add_argument("--calibrator", default="mse")
    parser.add_argument("--first-last", default="auto")
    parser.add_argument("--images", type=int, default=1000, help="to measure on")
    parser.add_argument("--validation", action="store_true", help="measure on validation images, to choose by")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = arguments()
    tune_allocator()
    artifact = load(args.artifact, args.model)
    model = artifact.model.eval()
    dataset = open_data(DataConfig(data=args.data, image_size=args.image_size), artifact)
    batches = list(calibration_batches(dataset, RangeConfig(calib_batches=args.calib_batches), seed=1))
    split = dataset.validation if args.validation else dataset.test
    pairs = list(eval_batches(random_subset(split, args.images, 1), dataset.spec, 64))
    images, labels = [x for x, _ in pairs], None if args.unlabelled else torch.cat([y for _, y in pairs])
    reference = outputs(model, images)
    counts = f"{sum(map(len, batches))} images to calibrate on, {len(reference)} to measure on"
    print(f"{describe_machine()}, torch {versions()['torch']}; {args.artifact.name}, {counts}\n")
    print("| network | first class as in float | SQNR, dB | right | s |\n| --- | ---: | ---: | ---: | ---: |")
    print(row("float", 0, reference, reference, labels), flush=True)
    statistics = collect(quantize_model(model, QuantConfig())[0], batches)
    for bits in args.bits:
        w_bits, a_bits = map(int, bits.removeprefix("W").split("A"))
        config = QuantConfig(w_bits=w_bits, a_bits=a_bits, first_last=args.first_last)
        for name in args.ways:
            if name in OTHERS and importlib.util.find_spec(name) is None:
                continue
            torch.manual_seed(0)
            start = time.perf_counter()
            if name in OTHERS:
                try:
                    made = OTHERS[name](model, batches, w_bits, a_bits)
                except ValueError as refused:  # NNCF 3.4 takes fewer than 8 bits for no device
                    print(f"| {bits}, {name} | {str(refused).split('.')[0][:80]} | | | |", flush=True)
                    continue
            else:
                made, _ = quantize_model(model, config)
                set_ranges(made, statistics, args.calibrator, 99.99)
                for recover in WAYS[name]:
                    recover(model, made, batches)
            seconds = time.perf_counter() - start
            print(row(f"{bits}, {name}", seconds, outputs(made, images), reference, labels), flush=True)


if __name__ == "__main__":
    main()
