"""RGB encoders, one a file: photos to a grid of patches. Importing this package registers them."""

from annexe.models.vision_encoders import eva_vit  # noqa: F401  (registers its component)
