"""The text decoder of Qwen2-VL: the layers of one stage, the embedding and the output head where they live."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    checkpoint,
    gather_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor, nn

from mindspeed_mm.models.common.attention import RowLayout
from mindspeed_mm.models.common.transformer import ACTIVATIONS, build_block, tower_config
from mindspeed_mm.ops.rotary import mrope_tables
from mindspeed_mm.plan import Part, Stage
from mindspeed_mm.plan.activations import LOGITS_BYTES

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mindspeed_mm.config import TextDecoderConfig
    from mindspeed_mm.models.common.building import Building


def text_config(text: TextDecoderConfig, building: Building, **fields: Any) -> TransformerConfig:
    """Megatron's settings of the text decoder; `fields` add to or override them."""
    return tower_config(
        building,
        **{
            "num_layers": text.num_layers,
            "hidden_size": text.hidden_size,
            "ffn_hidden_size": text.ffn_hidden_size,
            "num_attention_heads": text.num_attention_heads,
            "num_query_groups": text.num_query_groups,
            "kv_channels": text.kv_channels,
            "activation_func": ACTIVATIONS[text.activation_func],
            "gated_linear_unit": text.gated_linear_unit,
            "normalization": text.normalization,
            "layernorm_epsilon": text.layernorm_epsilon,
            "add_bias_linear": text.add_bias_linear,
            "add_qkv_bias": text.add_qkv_bias,
            "init_method_std": text.init_method_std,
            "recompute_granularity": text.recompute_granularity,
            "recompute_method": text.recompute_method,
            "recompute_num_layers": text.recompute_num_layers,
            **fields,
        },
    )


class Embedding(nn.Module):
    """Token embedding split over the vocabulary."""

    def __init__(self, text: TextDecoderConfig, config: TransformerConfig) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(
            text.vocab_size, text.hidden_size, init_method=config.init_method, config=config
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        """[s, 1, h] of input_ids [s]."""
        return self.word_embeddings(input_ids).unsqueeze(1)


class TextDecoder(nn.Module):
    """The text layers of one stage.

    Args:
        text: settings of the decoder.
        stage: which layers and parts live here.
        is_tied: the output head uses the embedding's weight (as a copy when the embedding lives on another stage).
        building: what all modules of the chunk are told.
    """

    def __init__(
        self,
        text: TextDecoderConfig,
        stage: Stage,
        building: Building,
        *,
        is_tied: bool,
    ) -> None:
        super().__init__()
        config = text_config(text, building)
        self.tp_size = building.parallel.tp_size
        self.split = building.split
        self.rope_theta = text.rope_theta
        self.mrope_section = tuple(text.mrope_section)
        self.embedding = Embedding(text, config) if Part.TOKEN_EMBED in stage.parts else None
        self.decoder = build_block(
            config,
            stage.text,
            normalization=text.normalization,
            kernels=building.kernels,
            has_final_norm=Part.FINAL_NORM in stage.parts,
        )
        self.output_layer = None
        self.shares_embedding = is_tied and self.embedding is not None
        if Part.LM_HEAD in stage.parts:
            # Only supervised rows reach the head, gathered before: it must not gather once more.
            head_config = text_config(text, building.with_whole_rows())
            self.output_layer = ColumnParallelLinear(
                text.hidden_size,
                text.vocab_size,
                config=head_config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=self.shares_embedding,
            )

    def embed(self, input_ids: Tensor, image_rows: Tensor, image_embeds: Tensor | None) -> Tensor:
        """Token embeddings of the rows that this rank holds, with the rows of vision tokens replaced.

        Args:
            input_ids: [s] int64, the whole row, on the device.
            image_rows: [k] int64 on the host, ascending: where the first k image embeddings go, in order.
            image_embeds: [m, 1, h], m >= k; the rest (the dummy image of a micro-batch of text) gets zero gradients.
        Returns:
            [s/(cp*sp), 1, h].
        """
        assert self.embedding is not None
        hidden = self.embedding(self.split.take_local(input_ids))
        if image_embeds is not None:
            local = self.split.local(input_ids.shape[0])
            first, last = torch.searchsorted(image_rows, torch.tensor([local.start, local.stop])).tolist()
            rows = (image_rows[first:last] - local.start).to(hidden.device, non_blocking=True)
            hidden = hidden.index_copy(0, rows, image_embeds[first:last])
        return self.split.enter_layers(hidden)

    def forward(self, hidden: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Hidden states after this stage's layers (and the final norm where it lives).

        Args:
            hidden: [s/(cp*sp), 1, h].
            position_ids: [3, s] int64 of the whole row, on the device.
            cu_seqlens: [samples + 1] int32 of the whole row, on the host.
        """
        split, length = self.split, position_ids.shape[1]
        positions = split.pad(position_ids, dim=1)
        cos, sin = mrope_tables(positions, self.mrope_section, self.rope_theta, hidden.dtype)
        cu_seqlens = split.pad_segments(cu_seqlens, length)
        layout = RowLayout(cu_seqlens=cu_seqlens, causal=True, cos=cos, sin=sin, split=split)
        return self.decoder(hidden, None, packed_seq_params=layout)

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary-parallel logits [k, 1, v/tp] of hidden states [k, 1, h]."""
        assert self.output_layer is not None
        weight = self.embedding.word_embeddings.weight if self.shares_embedding and self.embedding else None
        logits, _ = self.output_layer(hidden, weight=weight)
        return logits

    def full_logits(self, hidden: Tensor) -> Tensor:
        """Logits [k, v] of hidden states [k, 1, h], gathered over the tensor-parallel ranks."""
        logits = self.logits(hidden)
        return gather_from_tensor_model_parallel_region(logits).squeeze(1)

    def token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of every supervised position.

        Args:
            hidden: [k, 1, h], only the supervised positions.
            labels: [k] int64.
        Returns:
            [k] float32.
        """
        assert self.output_layer is not None
        rows_at_once = max(1, LOGITS_BYTES // (4 * self.output_layer.output_size_per_partition))
        if hidden.shape[0] <= rows_at_once:
            return self._token_losses(hidden, labels)
        parts = zip(hidden.split(rows_at_once), labels.split(rows_at_once), strict=True)
        return torch.cat([checkpoint(self._token_losses, False, rows, targets) for rows, targets in parts])

    def _token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.logits(hidden).float()
        if self.tp_size == 1:
            return F.cross_entropy(logits.squeeze(1), labels, reduction="none")
        return vocab_parallel_cross_entropy(logits, labels.unsqueeze(1)).squeeze(1)
