"""The model: one file per box of the paper's figure. Importing this package registers the boxes."""

from annexe.models import (  # noqa: F401  (each registers its components)
    deconv_decoder,
    depth_branch,
    pixel_decoder,
    projector,
    vision_encoders,
)
from annexe.models.annexe import Annexe
from annexe.models.language_model import causal_lm, llama  # noqa: F401
from annexe.registry import register

register("model", "annexe")(Annexe)
