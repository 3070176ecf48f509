"""One model chunk of Qwen2-VL: what a stage of the plan holds, and its forward pass."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from mindspeed_mm.models.common.building import Building
from mindspeed_mm.models.common.kernels import choose_kernels
from mindspeed_mm.models.common.sequence import RowSplit
from mindspeed_mm.models.common.transformer import DTYPES
from mindspeed_mm.models.qwen2vl.text import TextDecoder, text_config
from mindspeed_mm.models.qwen2vl.vision import ImageEncoder
from mindspeed_mm.ops.loss import supervised_rows
from mindspeed_mm.plan import Part, Stage, StagePlan, Stream

if TYPE_CHECKING:
    from mindspeed_mm.config import ParallelConfig, Qwen2VLConfig, TrainingConfig
    from mindspeed_mm.ops.batch import Batch
    from mindspeed_mm.platform.base import Platform


class InputGradient(StrEnum):
    """What the schedule finds as the gradient of a chunk's input."""

    WHOLE = "whole"
    NONE = "none"
    """Nothing: the stage before receives nothing."""
    STAND_IN = "stand_in"
    """One number, for a schedule that always sends something."""


class Qwen2VLChunk(MegatronModule):
    """A stage of Qwen2-VL. Parameter names are those of checkpoints: `image_encoder.*`, `text_decoder.*`, layers from
    0.

    Args:
        model: model settings.
        plan: the stage plan of the run.
        stage: the stage of `plan` to build.
        platform: gives the device and the fused kernels.
        cp_group: ranks that share every row; None for one rank.
        initialize: fill weights at random; off when a checkpoint follows, which fills every one of them.
    """

    def __init__(
        self,
        model: Qwen2VLConfig,
        plan: StagePlan,
        stage: Stage,
        parallel: ParallelConfig,
        training: TrainingConfig,
        platform: Platform,
        cp_group: dist.ProcessGroup | None,
        *,
        initialize: bool,
    ) -> None:
        split = RowSplit(cp_group, parallel.tp_size if parallel.sequence_parallel else 1)
        building = Building(parallel, training, choose_kernels(platform), split, initialize)
        # Megatron's schedules, DDP and gradient finalisation read the settings of the whole pipeline from here.
        super().__init__(
            config=text_config(
                model.text_decoder,
                building,
                recompute_granularity=None,
                recompute_method=None,
                recompute_num_layers=None,
                pipeline_model_parallel_size=parallel.pp_size,
                pipeline_dtype=DTYPES[training.params_dtype],
                virtual_pipeline_model_parallel_size=parallel.vp_size if parallel.vp_size > 1 else None,
                # With two stages both neighbours are one process: batched sends of the interleaved schedule mix them
                # up.
                batch_p2p_comm=parallel.vp_size == 1,
                overlap_p2p_comm=parallel.vp_size > 1,
                # The interleaved schedule frees what it sent before it waits for the send; gloo may still be reading.
                deallocate_pipeline_outputs=parallel.vp_size == 1 or dist.get_backend() != "gloo",
                calculate_per_token_loss=training.calculate_per_token_loss,
            )
        )
        self.model_type = ModelType.encoder_or_decoder
        self.stage = stage
        self.device = platform.device
        self.pre_process = Part.TOKEN_EMBED in stage.parts
        self.post_process = Part.LM_HEAD in stage.parts
        self.vp_stage = stage.vp_stage if plan.vp_size > 1 else None
        # Megatron looks for the tied weights on the first and the last pipeline rank, where the plan need not have put
        # them; `mindspeed_mm.training.gradients` sums their gradients instead.
        self.share_embeddings_and_output_weights = False
        self.holds_tied_copy = plan.is_tied and plan.stage_of(Part.TOKEN_EMBED) != plan.stage_of(Part.LM_HEAD)
        self.input_gradient = InputGradient.WHOLE
        self._received: Tensor | None = None
        self.image_encoder: ImageEncoder | None = None
        self.text_decoder: TextDecoder | None = None
        self.split = split
        if model.image_encoder is not None and (stage.vision or Part.PROJECTOR in stage.parts):
            self.image_encoder = ImageEncoder(model.image_encoder, stage, building)
        if stage.text:
            text = model.text_decoder
            self.text_decoder = TextDecoder(text, stage, building, is_tied=plan.is_tied)
            self.text_decoder.requires_grad_(not text.freeze)
        tied = self.tied_weight()
        if tied is not None:
            # A bucket of its own on both stages: the distributed optimizer then splits both copies alike.
            setattr(tied, "shared_embedding", True)  # noqa: B010, torch types no such attribute
            # Megatron leaves a parameter so marked out of the gradient norm: the original counts once.
            setattr(tied, "shared", not self.pre_process)  # noqa: B010

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take what the stage before sent; called by megatron's schedules before every forward pass."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if received is None or self.input_gradient is InputGradient.WHOLE:
            self._received = received
            return
        self._received = received.detach()
        # The schedule keeps what it received until the backward pass: leave it an empty hull.
        received.data = received.new_empty(1, 1, 1)
        if self.input_gradient is InputGradient.STAND_IN:
            received.grad = torch.zeros_like(received)

    def tied_weight(self) -> torch.nn.Parameter | None:
        """The embedding, or the output head's copy of it, where the two live on different stages; None otherwise."""
        if not self.holds_tied_copy or self.text_decoder is None:
            return None
        if self.text_decoder.embedding is not None:
            return self.text_decoder.embedding.word_embeddings.weight
        return None if self.text_decoder.output_layer is None else self.text_decoder.output_layer.weight

    def forward(self, batch: Batch, *, wants_logits: bool = False) -> Tensor:
        """The payload for the next stage, or the token losses on the last one.

        Args:
            batch: this micro-batch, on the host; pixels only where patches are embedded.
            wants_logits: on the last stage, give logits instead of losses (parity tests, evaluation).
        Returns:
            the rows that this rank holds of vision states [p, 1, e] or text states [s, 1, h], or all image embeddings
            [p/merge^2, 1, h]; on the last stage the losses of `local_supervised_rows` [k] float32, or with
            `wants_logits` the logits of all positions [s, v].
        """
        received, self._received = self._received, None
        image_embeds = received if Stream.IMAGE_EMBEDS in self.stage.inputs else None
        if self.image_encoder is not None:
            pixels = None if batch.pixel_values is None else batch.pixel_values.to(self.device, non_blocking=True)
            image_embeds = self.image_encoder(received, pixels, batch.grid_thw)
        if self.text_decoder is None:
            assert image_embeds is not None
            return image_embeds
        if self.text_decoder.embedding is not None:
            input_ids = batch.input_ids.to(self.device, non_blocking=True)
            hidden = self.text_decoder.embed(input_ids, batch.image_rows, image_embeds)
        else:
            assert received is not None, "a stage after the embedding receives text states"
            hidden = received
        positions = batch.position_ids.to(self.device, non_blocking=True)
        hidden = self.text_decoder(hidden, positions, batch.cu_seqlens)
        if not self.post_process:
            return hidden
        hidden = self.split.leave_layers(hidden)
        if wants_logits:
            return self.split.gather_rows(self.text_decoder.full_logits(hidden), batch.num_tokens)
        rows = self.local_supervised_rows(batch)
        labels = batch.labels[rows].to(self.device, non_blocking=True)
        local = rows - self.split.local(batch.num_tokens).start
        return self.text_decoder.token_losses(hidden[local.to(self.device, non_blocking=True)], labels)

    def local_supervised_rows(self, batch: Batch) -> Tensor:
        """Supervised positions of the whole row whose losses this rank computes: [k] int64 on the host."""
        rows, local = supervised_rows(batch.labels), self.split.local(batch.num_tokens)
        return rows[(rows >= local.start) & (rows < local.stop)]


def build_chunk(
    model: Qwen2VLConfig,
    plan: StagePlan,
    stage: Stage,
    parallel: ParallelConfig,
    training: TrainingConfig,
    platform: Platform,
    cp_group: dist.ProcessGroup | None = None,
    *,
    initialize: bool,
) -> Qwen2VLChunk:
    """Build the chunk of one stage on the platform's device; arguments as Qwen2VLChunk."""
    with platform.device:
        return Qwen2VLChunk(model, plan, stage, parallel, training, platform, cp_group, initialize=initialize)
