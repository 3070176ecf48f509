"""Every CUDA name on megatron-core's training path is redirected by the table, or listed here with its reason."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from mindspeed_mm.platform.cpu import CpuPlatform
from mindspeed_mm.platform.npu import REDIRECTED
from mindspeed_mm.platform.replacements import FACTORIES

# fmt: off
TRAINING_PATH = (
    "parallel_state.py", "tensor_parallel/random.py", "tensor_parallel/layers.py", "tensor_parallel/mappings.py",
    "tensor_parallel/utils.py", "tensor_parallel/data.py", "tensor_parallel/cross_entropy.py",
    "pipeline_parallel/p2p_communication.py", "pipeline_parallel/schedules.py",
    "distributed/distributed_data_parallel.py", "distributed/param_and_grad_buffer.py",
    "distributed/finalize_model_grads.py", "optimizer/__init__.py", "optimizer/clip_grads.py",
    "optimizer/optimizer.py", "optimizer/distrib_optimizer.py", "optimizer/grad_scaler.py",
    "models/common/embeddings/rotary_pos_embedding.py", "models/common/embeddings/rope_utils.py",
    "models/common/language_module/language_module.py", "transformer/module.py", "transformer/attention.py",
    "transformer/transformer_layer.py", "transformer/transformer_block.py", "transformer/dot_product_attention.py",
    "transformer/mlp.py", "transformer/utils.py", "timers.py", "utils.py", "jit.py", "fusions/fused_bias_swiglu.py",
    "fusions/fused_bias_gelu.py",
)
# fmt: on

_STRAGGLER = "straggler detector only; the project does not use it"
_GRAPHS = "CUDA graphs only"
IGNORED = {
    "torch.cuda.amp.custom_fwd": "older torch; torch.amp.custom_fwd is taken and redirected",
    "torch.cuda.amp.custom_bwd": "older torch; torch.amp.custom_bwd is taken and redirected",
    "torch.cuda.CUDAGraph": _GRAPHS,
    "torch.cuda.default_generators": "only in the random state helpers, which a row replaces",
    "torch.cuda._lazy_call": "only in the random state helpers, which a row replaces",
    "torch.cuda._lazy_init": "only in the random state helpers, which a row replaces",
    "torch.cuda.device": "only in the random state helpers, which a row replaces",
    "torch.cuda.is_available": _STRAGGLER,
    "torch.cuda.temperature": _STRAGGLER,
    "torch.cuda.power_draw": _STRAGGLER,
    "torch.cuda.utilization": _STRAGGLER,
    "torch.cuda.clock_rate": _STRAGGLER,
}
IGNORED_STRINGS = {
    ("pipeline_parallel/schedules.py", "autocast"): "only with enable_autocast, which the project leaves off",
    ("tensor_parallel/random.py", "device"): "only in the random state helpers, which a row replaces",
    ("utils.py", "empty"): "symmetric memory, inference only",
}
IGNORED_ATTRIBUTES = {
    "optimizer/optimizer.py": "is_cuda guards moving optimizer state to the host; on CPU it lies there",
}


def _training_files() -> Iterator[tuple[str, ast.Module]]:
    # find_spec of the top package only: megatron.core itself must not be imported here.
    package = find_spec("megatron")
    assert package is not None
    assert package.submodule_search_locations
    core = Path(next(iter(package.submodule_search_locations))) / "core"
    for name in TRAINING_PATH:
        yield name, ast.parse((core / name).read_text())


FILES = list(_training_files())


def _dotted(node: ast.AST) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def _cuda_names(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torch.cuda"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        dotted = _dotted(node) if isinstance(node, ast.Attribute) else None
        if dotted and dotted.startswith("torch.cuda."):
            found.add(dotted)
    # Every build of torch has the exception class.
    found.discard("torch.cuda.OutOfMemoryError")
    # An attribute chain is seen from each of its ends: keep the longest form.
    return {name for name in found if not any(other.startswith(name + ".") for other in found)}


@pytest.mark.parametrize(("file", "tree"), FILES, ids=[file for file, _ in FILES])
def test_every_cuda_name_of_megatron_is_redirected_or_explained(file: str, tree: ast.Module) -> None:
    cpu = {f"torch.cuda.{name}" for name in CpuPlatform().cuda_names()}
    npu_extra = {"get_rng_state", "set_rng_state", "random.get_rng_state", "nvtx.range_push", "nvtx.range_pop"}
    npu = {f"torch.cuda.{name}" for name in {*REDIRECTED, *npu_extra}}
    names = {re.sub(r"(Stream|Event)\..*", r"\1", name) for name in _cuda_names(tree)}
    assert names - cpu - IGNORED.keys() == set()
    assert names - npu - IGNORED.keys() == set()


@pytest.mark.parametrize(("file", "tree"), FILES, ids=[file for file, _ in FILES])
def test_every_device_argument_goes_to_a_wrapped_function(file: str, tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        callee = (_dotted(node.func) or ast.unparse(node.func)).rpartition(".")[2]
        if callee in ("hasattr", "getattr", "device"):
            continue
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        if any(isinstance(a, ast.Constant) and a.value in ("cuda", "cuda:0") for a in arguments):
            known = {*FACTORIES, "to", "Stream", "custom_fwd", "custom_bwd", "partial"}
            assert callee in known or (file, callee) in IGNORED_STRINGS, ast.unparse(node)


def test_device_defaults_and_attributes_are_explained() -> None:
    files = {name for name, tree in FILES for node in ast.walk(tree) if getattr(node, "attr", None) == "is_cuda"}
    assert files <= IGNORED_ATTRIBUTES.keys()


def test_type_names_are_those_that_the_table_answers() -> None:
    compared = set()
    for _, tree in FILES:
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                compared |= set(re.findall(r"torch\.cuda\.\w+Tensor", node.value))
    platform = CpuPlatform()
    answers = {platform.type_name(f"torch.{kind}Tensor") for kind in ("Float", "Half", "BFloat16")}
    assert compared == answers


def test_no_explanation_is_left_over() -> None:
    names = {name for _, tree in FILES for name in _cuda_names(tree)}
    assert IGNORED.keys() - names == set()
