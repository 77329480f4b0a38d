"""The released pixel decoder, without its defects.

Legend: B images, Q queries, K slots, L prompt tokens, D language width, R rows mixed with the
pixels, G patches a side, h x w mask logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from annexe.errors import UserError, require_sizes
from annexe.registry import register
from annexe.structures.batch import QueryIndex
from annexe.structures.prediction import Grounding


@register("pixel_decoder", "deconv")
class DeconvDecoder(nn.Module):
    """The released mask branch: a presence CNN and four transposed convolutions to K + 1 classes.

    Made deterministic, independent of the answer and of the other samples of a batch. Class 0 is
    the background; class scores become one map of log-odds a slot, so that both decoders share
    losses and thresholds. Masks have 16 G pixels a side.

    Args:
        language_dim: D.
        rgb_dim: not used, as in the released design.
        depth_channels: channels of the depth branch's maps.
        grid: G.
        num_slots: targets that a query can have.
        num_rows: R, prompt states that are mixed with the pixels, spread evenly over the prompt.
        defects: restores the released defects, to show what they cost: rows are drawn at random at
            every call, no gradient reaches the language model, depth features are viewed where
            they have to be transposed, and presence does not gate masks.

    Raises:
        UserError: for a size below 1, or without a depth branch.
    """

    conditioning = "prompt"
    reads_whole_prompts = True

    def __init__(
        self,
        language_dim: int,
        rgb_dim: int,
        depth_channels: int,
        grid: int,
        *,
        num_slots: int = 4,
        num_rows: int = 256,
        defects: bool = False,
    ) -> None:
        super().__init__()
        require_sizes("model.pixel_decoder", num_slots=num_slots, num_rows=num_rows)
        if not depth_channels:
            raise UserError(
                "model.pixel_decoder of type deconv reads masks from the maps of a depth branch, "
                "and model.depth_branch is none; set model.pixel_decoder.type=query"
            )
        self.grid = grid
        self.num_slots = num_slots
        self.num_rows = num_rows
        self.defects = defects
        self.presence_gates_masks = not defects
        self.presence_cnn = nn.Sequential(
            nn.Conv2d(num_rows, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(128, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(64 * 16 * 16, 256), nn.ReLU(), nn.Linear(256, num_slots),
        )  # fmt: skip
        self.pixels = nn.Conv2d(depth_channels, num_rows, 1)
        self.deconv = nn.Sequential(
            nn.ConvTranspose2d(num_rows, 128, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(64, 16, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(16, num_slots + 1, 4, 2, 1),
        )  # fmt: skip

    def forward(
        self,
        states: Tensor,
        state_mask: Tensor,
        patches: Tensor,
        maps: list[Tensor],
        queries: QueryIndex,
    ) -> list[Grounding]:
        """Decode every query; arguments are those of `QueryDecoder.forward`.

        ``patches`` are not used, as in the released design. The list has one grounding.
        """
        rows = self._rows(states, state_mask)  # [Q, R, D]

        # Presence from the prompt alone
        square = F.adaptive_avg_pool1d(rows, 64 * 64).unflatten(2, (64, 64))
        presence = self.presence_cnn(square)

        # Scores of K + 1 classes from prompt and pixels
        text = F.adaptive_max_pool1d(rows, self.grid**2).unflatten(2, (self.grid, self.grid))
        pixels = F.adaptive_avg_pool2d(maps[0], self.grid)
        if self.defects:
            pixels = pixels.permute(0, 2, 3, 1).reshape(pixels.shape)
        pixels = self.pixels(pixels)[queries.image_index]  # [Q, R, G, G]
        classes = self.deconv(text + pixels)  # [Q, K + 1, h, w]

        # Log-odds of a slot against all other classes
        others = []
        for slot in range(1, self.num_slots + 1):
            rest = torch.cat([classes[:, :slot], classes[:, slot + 1 :]], dim=1)
            others.append(torch.logsumexp(rest, dim=1))
        return [Grounding(presence, classes[:, 1:] - torch.stack(others, dim=1))]

    def _rows(self, states: Tensor, state_mask: Tensor) -> Tensor:
        """Prompt states float[Q, R, D] at R columns, spread evenly over every prompt."""
        length = state_mask.sum(1, keepdim=True)  # [Q, 1]
        fraction = torch.arange(self.num_rows, device=states.device) / self.num_rows
        if self.defects:
            states = states.detach()
            fraction = torch.rand_like(fraction).sort().values
        columns = (fraction * length).long()[..., None].expand(-1, -1, states.shape[-1])
        return states.gather(1, columns)
