"""Settings of the model and the loss of a form without extras, for tests that change a few."""

from __future__ import annotations

from mocme_dist.config import Config, load_config
from mocme_dist.model.entropy import Weighting
from mocme_dist.model.fusion import FusionSettings
from mocme_dist.model.loss import LossSettings
from mocme_dist.model.mocme import ModelSettings
from mocme_dist.training.build import loss_settings, model_settings

PLAIN: Config = load_config(
    [],
    ["projection.structure=mlp", "experts.residual=false", "negatives.weighting=entropy", "rotate.gamma=12"],
)
MODEL: ModelSettings = model_settings(PLAIN, 1)
FUSION: FusionSettings = MODEL.fusion
LOSS: LossSettings = loss_settings(PLAIN.train, PLAIN.negatives, PLAIN.rotate.gamma, compiled=False)
WEIGHTING: Weighting = LOSS.weighting
