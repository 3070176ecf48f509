"""Towers assembled from megatron-core parts: stock linears, MLP, attention and blocks; our norm and core attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from mindspeed_mm.models.common.attention import CoreAttention
from mindspeed_mm.models.common.norm import norm_spec

if TYPE_CHECKING:
    from mindspeed_mm.models.common.building import Building
    from mindspeed_mm.models.common.kernels import Kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


def keep_memory(_: Tensor) -> None:
    """An initialiser that leaves the weight as allocated, for weights that a checkpoint fills.

    Megatron's own switch `perform_initialization` also skips the marks that say how a weight is split, without which
    the gradient norm misses the shards of all tensor-parallel ranks but the first.
    """


def tower_config(building: Building, **fields: Any) -> TransformerConfig:
    """Megatron's settings of one tower.

    The pipeline size is left at 1: the stage plan, not megatron, decides which layers a tower builds here.

    Args:
        building: parallel sizes, dtype, and whether weights are filled.
        fields: further fields of TransformerConfig (layers, sizes, activation, recompute).
    """
    parallel, training = building.parallel, building.training
    if not building.initialize:
        fields |= {"init_method": keep_memory, "output_layer_init_method": keep_memory}
    return TransformerConfig(
        tensor_model_parallel_size=parallel.tp_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tp_size > 1,
        params_dtype=DTYPES[training.params_dtype],
        bf16=training.params_dtype == "bf16",
        fp16=training.params_dtype == "fp16",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        # Shapes differ per micro-batch; megatron ties this switch to a dispatcher name that a dense model never uses.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        **fields,
    )


class StageLayer(TransformerLayer):
    """A stock layer that knows its global number although the stage plan, not megatron's even split, placed it."""

    def __init__(self, config: TransformerConfig, layer_number: int = 1, *, first_layer: int, **kwargs: Any) -> None:
        super().__init__(config=config, layer_number=layer_number + first_layer, **kwargs)


def mlp_submodules() -> MLPSubmodules:
    """Stock column- and row-parallel linears."""
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _core_attention(kernels: Kernels) -> type[CoreAttention]:
    """The core attention with its kernels; a class, which is what all supported megatron releases can build."""

    class KernelAttention(CoreAttention):
        def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
            super().__init__(config, kernels=kernels, **kwargs)

    return KernelAttention


def _mlp(config: TransformerConfig, kernels: Kernels) -> ModuleSpec | type[MLP]:
    """The stock MLP; with SwiGLU, one that calls the platform's kernel for it."""
    if not (config.gated_linear_unit and config.activation_func is F.silu):
        return ModuleSpec(module=MLP, submodules=mlp_submodules())

    # A class and not a spec of one: given a spec of a class that it does not know, megatron warns in every layer.
    class SwigluMLP(MLP):
        def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
            super().__init__(config, mlp_submodules(), **kwargs)

        def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
            both, bias = self.linear_fc1(hidden_states)
            return self.linear_fc2(kernels.swiglu(both if bias is None else both + bias))

    return SwigluMLP


def build_block(
    config: TransformerConfig,
    layers: range,
    *,
    normalization: str,
    kernels: Kernels,
    has_final_norm: bool,
) -> TransformerBlock:
    """The transformer layers that one stage holds of one tower.

    Args:
        config: of the tower.
        layers: global numbers, from 0.
        normalization: "RMSNorm" or "LayerNorm".
        kernels: fused operations of the platform.
        has_final_norm: whether the norm after the last layer lives here.
    """
    norm = norm_spec(normalization, kernels)
    layer = ModuleSpec(
        module=StageLayer,
        params={"first_layer": layers.start},
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                # The mask type names nothing here: causality is in the RowLayout.
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=_core_attention(kernels),
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_mlp(config, kernels),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    submodules = TransformerBlockSubmodules(layer_specs=[layer] * len(layers), layer_norm=norm)
    return TransformerBlock(config=config, spec=submodules, post_layer_norm=has_final_norm, post_process=has_final_norm)
