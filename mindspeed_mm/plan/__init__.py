"""The stage plan: which layers and parts each pipeline stage holds, its checks and its estimates. Imports no torch."""

from mindspeed_mm.plan.checks import check_trainable
from mindspeed_mm.plan.dry_run import render_dry_run
from mindspeed_mm.plan.stage import Part, Stage, StagePlan, Stream, Tower

__all__ = ["Part", "Stage", "StagePlan", "Stream", "Tower", "check_trainable", "render_dry_run"]
