"""Compile the Triton kernels for a chip that need not be there, and print what became of them as JSON.

    python triton_ahead_of_time.py sm_90 [REGULAR EXPRESSION [PART/PARTS]]

The expression chooses among the variants by their names; of chosen ones instructions are counted, which takes longer
than to compile them. Launches are recorded from calls on CPU tensors, so that kernels are compiled with the arguments
they are called with.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedvae import functional
from fusedvae.backend import triton as backend
from fusedvae.backend.reference import LIKELIHOODS, NORMAL_FORMS
from fusedvae.random import normal

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# The kernels' parameters; of an objective's, those of its terms have a prefix.
INPUTS = ("in0", "in1", "in2", "in3", "weight", "incoming", "noise", "grad_z")
OUTPUTS = ("value", "g0", "g1", "g2", "g3", "z", "out")
PREFIXES = ("", "a_", "b_")
SHAPE = (64, 4, 64, 64)
OPTIONS = ("num_warps", "maxnreg", "enable_fp_fusion")
DOUBLES = (torch.float64,) if backend.launch.VERSION >= (3, 4) else ()
FLOATS = (torch.float32, torch.bfloat16, torch.float16, *DOUBLES)


def launches(call: Any, *, wide: bool = False) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that a call launches, with their arguments."""
    found: list[tuple[Any, dict[str, Any]]] = []
    backend.launch._launch = lambda kernel, programs, arguments: found.append((kernel, dict(arguments)))
    call()
    for kernel, arguments in found:
        assert set(arguments) - set(OPTIONS) == set(kernel.arg_names)
    if wide:
        for _, arguments in found:
            for name in {"walk", "a_walk", "b_walk"} & set(arguments):
                arguments[name] |= 1
    return found


def leaf(dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.empty(shape, dtype=dtype).fill_(0.5).requires_grad_(dtype.is_floating_point)


def step(recon_x: Tensor, x: Tensor, recon_logvar: Tensor | float | None, mu: Tensor, logvar: Tensor | None) -> None:
    """All launches of training steps with a total and with values per sample."""
    functional.elbo_loss(recon_x, x, mu, logvar, recon_logvar, backend="triton").backward()
    functional.elbo_loss(recon_x, x, mu, logvar, recon_logvar, reduction="none", backend="triton").sum().backward()
    latent(mu, logvar)


def given(recon_x: Tensor, x: Tensor, recon_logvar: Tensor, mu: Tensor, logvar: Tensor) -> None:
    """Those of a total whose divergence comes from the latent."""
    _, kl = functional.latent(mu, logvar, backend="triton")
    functional.elbo_loss(recon_x, x, None, None, recon_logvar, kl=kl, beta=0.5, backend="triton").backward()


def reparameterize(*operands: Tensor, **options: Any) -> Tensor:
    return functional.reparameterize(*operands, backend="triton", **options)


def latent(*operands: Tensor, **options: Any) -> None:
    """The launches of a sample with its divergence, forward and backward."""
    z, kl = functional.latent(*operands, backend="triton", **options)
    torch.autograd.backward([z, kl], [torch.ones_like(z), torch.ones_like(kl)])


def objective(*operands: Tensor, **options: Any) -> None:
    """The launches of an objective with a total and with values per sample, forward and backward."""
    functional.elbo_loss(*operands, backend="triton", **options).backward()
    functional.elbo_loss(*operands, reduction="none", backend="triton", **options).sum().backward()


def variants() -> dict[str, list[tuple[Any, dict[str, Any]]]]:
    """Name -> launches. Those that are "contiguous" must move all their elements 128 bits at a time."""
    found = {}
    for dtype in FLOATS:
        name = str(dtype).partition(".")[2]
        t = [leaf(dtype) for _ in range(5)]
        found[f"contiguous {name}"] = [
            *launches(lambda t=t: step(*t)),
            *launches(lambda t=t: given(*t)),
            *launches(lambda t=t: reparameterize(t[3], t[4], noise=t[2].detach()).backward(t[0])),
            *launches(lambda t=t: functional.gaussian_nll_loss(*t[:3], reduction="none", backend="triton").sum()),
            *launches(lambda dtype=dtype: normal(SHAPE, 1, dtype=dtype, backend="triton")),
        ]
    f32, bf16, u8 = torch.float32, torch.bfloat16, torch.uint8
    t = [leaf(f32) for _ in range(5)]
    mixed = [leaf(bf16), leaf(u8), leaf(f32, (4, 1, 1)), leaf(bf16, (64, 128)), leaf(f32, (64, 128))]
    found["mixed dtypes"] = launches(lambda: step(*mixed))
    for shape in ((), (64, 1, 1, 1), (64, 4, 1, 1), (1, *SHAPE[1:]), (64, 1, 64, 64), (64,)):
        found[f"log-variance {shape}"] = launches(lambda s=shape: step(t[0], t[1], leaf(f32, s), t[3], t[4]))
    found["a number for log-variance"] = launches(lambda: step(t[0], t[1], 0.5, t[3], t[4]))
    packed = leaf(f32, (64, 8, 64, 64))
    found["packed"] = launches(lambda: step(packed, t[1], None, packed, None))
    last = [v.detach().to(memory_format=torch.channels_last).requires_grad_() for v in (*t[:2], packed)]
    found["channels_last"] = launches(lambda: step(last[0], last[1], leaf(f32, (4, 1, 1)), last[0], last[1]))
    found["packed channels_last"] = launches(lambda: step(last[2], last[1], None, last[2], None))
    small = [leaf(f32, (37, 11)) for _ in range(5)]
    found["small and odd"] = launches(lambda: step(*small))
    for size in (1, 50, 5000):
        single = [leaf(f32, (1, size)) for _ in range(5)]
        found[f"one sample of {size}"] = launches(lambda t=single: step(*t))
    found["64-bit offsets"] = launches(lambda: step(*t), wide=True)
    return {**found, **variants_of_terms(), **variants_of_the_latent()}


def variants_of_terms() -> dict[str, list[tuple[Any, dict[str, Any]]]]:
    """All likelihoods, the forms of their scales, weights."""
    found = {}
    mask = torch.ones(SHAPE, dtype=torch.bool)
    for dtype in (torch.float32, torch.bfloat16, *DOUBLES):
        name = str(dtype).partition(".")[2]
        t = [leaf(dtype) for _ in range(5)]
        for likelihood, formula in LIKELIHOODS.items():
            inputs = [*t[:2], *t[3:], *([t[2]] if formula.pairs else [])]
            options: dict[str, Any] = {"likelihood": likelihood}
            # A thread has 4 elements of what is heavy, which is half of 128 bits in bfloat16.
            heavy = formula.name in backend.tiling.HEAVY and dtype == torch.bfloat16
            layout = "dense" if heavy else "contiguous"
            if "zi_logits" in formula.inputs:
                options["zi_logits"] = t[4]
            found[f"{layout} {likelihood}, {name}"] = launches(lambda i=inputs, o=options: objective(*i, **o))
            kept = {name: value for name, value in options.items() if name == "zi_logits"}
            weights = {"weight": t[2].detach(), "latent_weight": t[2].detach(), "grad_scale": torch.tensor(2.0)}
            options = {**options, **weights}
            found[f"{layout} {likelihood}, weights, {name}"] = launches(lambda i=inputs, o=options: objective(*i, **o))
            for recon_scale in list(formula.forms)[1:] if formula.scales else []:
                options = {**kept, "recon_scale": recon_scale, "recon_clamp": (0.1, 2.0), "recon_eps": 1e-3}
                found[f"{layout} {likelihood} of {recon_scale}, {name}"] = launches(
                    lambda i=inputs, o=options, n=likelihood: objective(*i, likelihood=n, **o)
                )
        for reduction in ("none", "weighted_mean"):
            options = {"weight": mask, "reduction": reduction, "backend": "triton"}
            found[f"a mask, {reduction}, {name}"] = launches(
                lambda t=t, o=options: functional.gaussian_nll(*t[:3], **o).sum().backward()
            )
    return found


def variants_of_the_latent() -> dict[str, list[tuple[Any, dict[str, Any]]]]:
    """Both divergences, analytic and at the sample, the forms of their scales, samples in front, offsets."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, *DOUBLES):
        name = str(dtype).partition(".")[2]
        t = [leaf(dtype) for _ in range(4)]
        for estimator in ("analytic", "sample"):
            for scale in NORMAL_FORMS:
                options: dict[str, Any] = {"estimator": estimator, "scale": scale, "prior_scale": scale}
                if scale != "logvar":
                    options["clamp"] = (0.1, 2.0)
                found[f"contiguous {estimator} of {scale}, {name}"] = launches(
                    lambda t=t, o=options: latent(*t[:2], **o)
                )
                # With two forms, 16-bit operands go 64 bits at a time.
                kind = "contiguous" if scale == "logvar" or dtype.itemsize > 2 else "dense"
                found[f"{kind} {estimator} of {scale}, a prior, {name}"] = launches(
                    lambda t=t, o=options: latent(*t, **o)
                )
            learned = [leaf(dtype, SHAPE[1:]) for _ in range(2)]
            options = {"estimator": estimator, "samples": 4}
            found[f"samples, {estimator}, a learned prior, {name}"] = launches(
                lambda t=t, p=learned, o=options: latent(*t[:2], *p, **o)
            )
        for offset in (4, 5, 2**40):
            found[f"offset {offset}, {name}"] = launches(lambda t=t, o=offset: latent(*t[:2], offset=o))
    for quads, name in ((1, "float32"), (2, "bfloat16")):
        found[f"contiguous, an offset in memory, {name}"] = [
            (kernel, {**a, "offset": torch.zeros((), dtype=torch.float64), "quads": quads})
            for kernel, a in found[f"offset 4, {name}"]
        ]
    return found


def source_of(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """What a launch would compile: alignment and ones are part of a kernel's signature."""
    if backend.launch.VERSION < (3, 3):
        return source_of_old(kernel, arguments)
    signature, constants, attributes = {}, {}, {}
    for k, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name], constants[(k,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name], aligned = TYPES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name], aligned = parameter.annotation_type or "fp32", False
        else:
            signature[parameter.name], aligned = "i64" if value >= 2**31 else "i32", value % 16 == 0
        if aligned and not parameter.do_not_specialize:
            attributes[(k,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def source_of_old(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """The same for Triton 3.2."""
    from triton.compiler import make_backend

    signature, constants = {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            constants[parameter.name] = value
        if isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif not parameter.is_constexpr:
            signature[parameter.name] = "*i8" if value is None else "i64" if value >= 2**31 else "i32"
    values = [arguments[parameter.name] for parameter in kernel.params]
    attributes = make_backend(GPUTarget("cuda", 80, 32)).get_attrs_descriptor(kernel.params, values)
    return ASTSource(kernel, signature, constants, attributes)


def local_memory(assembly: dict[str, Any], target: GPUTarget) -> int:
    """Bytes of memory of their own that threads need, for spilled registers or arrays; plus the count of spills.

    (AMD's scalar registers spill into lanes of vector registers.)
    """
    if target.backend == "hip":
        pattern = r"\.(?:private_segment_fixed_size|vgpr_spill_count):\s*(\d+)"
        found = re.findall(pattern, assembly["amdgcn"])
        assert len(found) == 2
        return sum(map(int, found))
    usage = seen_by("cuobjdump", "-res-usage", assembly)
    found = re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)
    assert len(found) == 2, usage
    return sum(map(int, found))


def seen_by(tool: str, option: str, assembly: dict[str, Any]) -> str:
    """What one of NVIDIA's tools, which come with Triton, says of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(assembly: dict[str, Any]) -> int:
    """The machine's instructions that a thread executes, but for those that add up the sums of all programs.

    Up to the first exit, where there are no loops of others. PTX is no measure of them: the halves of a product of 64
    bits are five instructions there, and one here.
    """
    listing = seen_by("nvdisasm", "-c", assembly)
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", listing)
    return found.index("EXIT")


def accesses(assembly: dict[str, Any], target: GPUTarget, kind: str) -> list[int]:
    """Bytes of each access to global memory that a program's threads do once, but for the sums of other tiles."""
    if target.backend == "hip":
        kind = {"ld": "load", "st": "store"}[kind]
        sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "byte": 1, "ubyte": 1}
        lines = [line for line in assembly["amdgcn"].splitlines() if not line.endswith(" nt")]
        found = re.findall(rf"(?:global|buffer|flat)_{kind}_([a-z0-9]+)(?:_d16_hi|_d16)?\b", "\n".join(lines))
        return [sizes[size.partition("_")[0]] for size in found]
    pattern = rf"\b{kind}\.global((?:\.[a-zA-Z_][\w:]*)*?)(?:\.v(\d))?\.[bfus](\d+)\b"
    found = re.findall(pattern, assembly["ptx"])
    return [int(vector or 1) * int(bits) // 8 for modifiers, vector, bits in found if ".cg" not in modifiers]


def what_became(assembly: dict[str, Any], target: GPUTarget, *, is_counted: bool) -> dict[str, Any]:
    """What there is to know of a compiled kernel."""
    return {
        "local": local_memory(assembly, target),
        "instructions": instructions(assembly) if is_counted and target.backend == "cuda" else None,
        **{kind: accesses(assembly, target, kind) for kind in ("ld", "st")},
    }


def wanted(arguments: dict[str, Any], names: tuple[str, ...]) -> int:
    """Bytes of the operands' elements in a tile, for operands that have one for every element."""
    if "data_0" in arguments:
        return sum(
            arguments["tile"] * arguments[f"data_{k}"].itemsize for k in range(8) if arguments[f"data_{k}"] is not None
        )
    total = 0
    for prefix, name in product(PREFIXES, names):
        tensor = arguments.get(prefix + name)
        if name == "in0" and arguments.get("grad_z") is not None and arguments["incoming"] is None:
            continue  # no part of the gradients of z
        if tensor is None or tensor.numel() != math.prod(SHAPE):
            continue
        tile = arguments["tile"] if "tile" in arguments else math.prod(arguments[f"{prefix}tile_{d}"] for d in "boi")
        total += tile * tensor.itemsize
    return total


def main(chip: str, chosen: str = "", part: str = "0/1") -> None:
    """Compile the variants that a regular expression finds; of these each fourth, say, from the second on: "1/4"."""
    first, parts = map(int, part.split("/"))
    is_amd = chip.startswith("gfx")
    target = GPUTarget("hip", chip, 64) if is_amd else GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)
    backend.tiling.LANES = target.warp_size
    type(backend.BACKEND).unavailable = lambda self, device_type, index=None: None
    compiled: dict[tuple[str, str], dict[str, Any]] = {}  # many launches are of the same
    results = []
    for number, (variant, found) in enumerate(variants().items()):
        # (Another of each group than of the group before: variants come in groups of dtypes.)
        is_taken = re.search(chosen, variant) and (number + number // parts) % parts == first
        for kernel, arguments in found if is_taken else ():
            source = source_of(kernel, arguments)
            options = {name: arguments[name] for name in OPTIONS if name in arguments}
            key = source.hash(), str(options)
            if key not in compiled:
                assembly = triton.compile(source, target=target, options=options).asm
                compiled[key] = what_became(assembly, target, is_counted=bool(chosen))
            result = {"variant": variant, "kernel": kernel.fn.__name__}
            result.update({name: compiled[key][name] for name in ("local", "instructions")})
            threads = arguments["num_warps"] * target.warp_size
            for kind, names in (("ld", INPUTS), ("st", OUTPUTS)):
                sizes = compiled[key][kind]
                result[kind] = {
                    "wide": sum(size for size in sizes if size == 16) * threads,
                    "others": sum(size != 16 for size in sizes),
                    "wanted": wanted(arguments, names),
                }
            results.append(result)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
