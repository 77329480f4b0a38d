"""RGB encoders, one a file: photos to a grid of patches. Importing this package registers them."""

from annexe.models.vision_encoders import (  # noqa: F401  (each registers its component)
    eva_vit,
    hf_vit,
    qwen_vit,
    timm_vit,
)
