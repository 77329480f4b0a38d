"""Kinds of problems that `annexe doctor` knows, and what it notes of one image."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

ERROR = "error"
WARNING = "warning"
NOTE = "note"

PROBLEMS = {
    # Files
    "missing-photo": (ERROR, "an image without its photo"),
    "missing-depth": (ERROR, "an image without its depth map"),
    "missing-mask": (ERROR, "an image without its id map"),
    "empty-file": (ERROR, "a file of zero bytes"),
    "orphan-file": (WARNING, "a photo, depth map or id map that no annotation file belongs to"),
    "extension": (WARNING, "a file whose ending the reader does not know, such as .JPG"),
    "other-file": (NOTE, "a file that is no part of the layout"),
    # Names and splits
    "name-not-utf-8": (ERROR, "an image whose name is not UTF-8"),
    "stem-pattern": (WARNING, "a stem that does not follow HOI4D's pattern"),
    "stem-category": (WARNING, "a stem with a category number that HOI4D does not have"),
    "stem-in-two-splits": (ERROR, "one image in two splits"),
    "missing-split": (NOTE, "a split of the data set has no images"),
    "split-size": (WARNING, "a split of EgoHOS with another number of photos than published"),
    "other-split": (NOTE, "a folder in dataset_split that is none of train, val, test"),
    "subset-stem": (WARNING, "a line of a list in subsets/ that names no image of any split"),
    "unreadable-list": (ERROR, "a list in subsets/ that is no text in UTF-8 or UTF-16"),
    "duplicate-image": (WARNING, "one photo under several stems of a split"),
    "duplicate-across-splits": (WARNING, "one photo under several stems of different splits"),
    # The annotation file as a whole
    "not-utf-8": (ERROR, "bytes that are not UTF-8"),
    "byte-order-mark": (WARNING, "a byte order mark before the JSON"),
    "not-json": (ERROR, "text that is not JSON"),
    "no-annotations": (ERROR, "JSON that is no list of annotations, or an empty one"),
    "duplicate-key": (ERROR, "a JSON object with one key twice"),
    # Fields
    "missing-field": (ERROR, "an annotation or question without a field it has to have"),
    "wrong-field": (ERROR, "a field of another type than documented"),
    "no-questions": (ERROR, "an annotation without questions"),
    "empty-text": (WARNING, "an empty answer or query, or a caption of spaces"),
    "no-analysis": (NOTE, "an image without analysis: its captions are empty"),
    "mojibake": (WARNING, "text that was decoded with a wrong encoding"),
    "control-character": (WARNING, "text with line breaks, tabs or invisible characters"),
    "duplicate-query-id": (
        WARNING,
        "one id for two queries of an annotation: evaluation asks the first one alone",
    ),
    "duplicate-query": (WARNING, "one wording twice in an annotation"),
    "repeated-query": (NOTE, "one wording in two annotations of an image, with the same targets"),
    "ambiguous-query": (
        WARNING,
        "one wording in two annotations of an image, with different targets",
    ),
    "captions-differ": (
        WARNING,
        "annotations of an image with different captions: the first one counts",
    ),
    # Targets
    "with-mask": (WARNING, "with_mask and masks_idx disagree on whether there is a target"),
    "answer-placeholders": (WARNING, "the answer's placeholders are not the used slots, one each"),
    "placeholder-form": (WARNING, "a placeholder that is neither <MSK> nor <MSK_k>"),
    "target-without-phrase": (WARNING, "a used slot whose token is empty"),
    "phrase-without-target": (WARNING, "a token in a slot that is not used"),
    "slot-gap": (
        WARNING,
        "a used slot behind an unused one: the model fills slots from the first on",
    ),
    "long-masks-idx": (WARNING, "masks_idx with more than 4 entries"),
    "target-twice": (WARNING, "one id in two slots of an annotation"),
    "id-range": (ERROR, "an id outside 0 to 255"),
    "target-without-pixels": (ERROR, "an id in masks_idx that is not in the id map"),
    # Pixels
    "unreadable-file": (ERROR, "an image file that the system does not give"),
    "unreadable-image": (ERROR, "a file that cannot be decoded as an image"),
    "truncated-image": (ERROR, "an image that is cut short"),
    "large-image": (ERROR, "an image of more pixels than are decoded"),
    "photo-bits": (ERROR, "a photo with more than 8 bits a channel"),
    "photo-format": (WARNING, "a photo that is no JPEG"),
    "photo-colour": (WARNING, "a photo that is not RGB"),
    "photo-rotated": (
        WARNING,
        "a photo whose EXIF data ask for a rotation, which the reader leaves out",
    ),
    "photo-exif": (WARNING, "a photo whose EXIF data are damaged; the reader leaves them out"),
    "photo-blank": (WARNING, "a photo of one color"),
    "mask-size": (ERROR, "an id map of another size than its photo"),
    "mask-lossy": (ERROR, "an id map in a format that changes ids, such as JPEG"),
    "mask-channels": (ERROR, "an id map with several channels"),
    "mask-values": (ERROR, "an id map with values that are no whole numbers from 0 to 255"),
    "mask-palette": (ERROR, "an id map with a palette of grays that may be its ids"),
    "mask-unknown-ids": (ERROR, "a label with ids that the data set does not have"),
    "mask-many-ids": (
        WARNING,
        "an id map with more than 32 ids: resized with interpolation, or once a JPEG?",
    ),
    "mask-interpolated": (
        WARNING,
        "an id map whose borders lead over ids in between: resized with interpolation?",
    ),
    "mask-empty": (WARNING, "an id map without any id"),
    "depth-size": (WARNING, "a depth map of another size than its photo"),
    "depth-channels": (ERROR, "a depth map with several channels"),
    "depth-palette": (ERROR, "a depth map with a palette, whose numbers are no distances"),
    "depth-values": (ERROR, "a depth map with values that are no distances of 16 bits"),
    "depth-lossy": (WARNING, "a depth map in a format that changes distances, such as JPEG"),
    "depth-empty": (NOTE, "a depth map without any measured pixel"),
    "depth-flat": (WARNING, "a depth map of one distance"),
    "depth-bits": (WARNING, "a depth map of other bits than most: is its unit another one?"),
}
"""Code -> severity and meaning.

The reader refuses an image with an error, and its stem goes into quarantine.
"""


@dataclass
class ImageReport:
    """Problems and facts of one image of a split.

    Attributes:
        split: folder of its annotation file.
        stem: name of the image.
        problems: code -> where in the image, each in a few words.
        num_queries: wordings of all annotations.
        num_annotations: those that could be read.
        kinds: annotations with ``none``, ``single`` or ``multi`` targets.
        targets: those that are a ``left hand``, a ``right hand``, a ``hand`` or an ``object``.
        photo_size: width, height.
        photo_hash: of the decoded pixels.
        unnamed_ids: ids of the map that no annotation names.
        depth_bits: 8, 16 or 32.
        holes: share of the depth map that was not measured.
    """

    split: str
    stem: str
    problems: dict[str, list[str]] = field(default_factory=dict)
    num_queries: int = 0
    num_annotations: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    targets: Counter[str] = field(default_factory=Counter)
    photo_size: tuple[int, int] | None = None
    photo_hash: bytes | None = None
    unnamed_ids: list[int] = field(default_factory=list)
    depth_bits: int | None = None
    holes: float | None = None

    def add(self, code: str, where: str) -> None:
        """Report a problem, at ``where`` in the image."""
        assert code in PROBLEMS, code
        self.problems.setdefault(code, []).append(where)
