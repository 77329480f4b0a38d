"""The released pixel decoder, without its defects."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from annexe.errors import require_sizes
from annexe.registry import register
from annexe.structures.batch import QueryIndex
from annexe.structures.prediction import Grounding


@register("pixel_decoder", "deconv")
class DeconvDecoder(nn.Module):
    """The released mask branch without its defects: 256 prompt rows spread evenly, no answer, no batch coupling.

    A presence CNN and four transposed convolutions to K + 1 classes, class 0 the background. The class scores leave
    as one log-odds map a slot, so both decoders share losses and thresholds. Logits stand at 16 G a side.

    Args:
        num_slots: targets a query can have.
        num_rows: prompt states that are mixed with the pixels.
        defects: with the released defects again, to show what they cost: rows drawn at random at every call, no
            gradient into the language model, depth features viewed where a transpose is needed, masks that presence
            does not gate.
    """

    reads = "prompt"

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
        self.grid, self.num_slots, self.num_rows, self.defects = grid, num_slots, num_rows, defects
        self.gates = not defects
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
        prompt: Tensor,
        prompt_mask: Tensor,
        patches: Tensor,
        maps: list[Tensor],
        queries: QueryIndex,
    ) -> list[Grounding]:
        """As `QueryDecoder.forward`; ``patches`` are not used, as in the released design."""
        length = prompt_mask.sum(1, keepdim=True)  # [Q, 1]
        step = torch.arange(self.num_rows, device=prompt.device) / self.num_rows
        if self.defects:
            prompt, step = prompt.detach(), torch.rand_like(step).sort().values
        columns = (step * length).long()[..., None].expand(-1, -1, prompt.shape[-1])
        rows = prompt.gather(1, columns)  # [Q, 256, D]
        presence = self.presence_cnn(F.adaptive_avg_pool1d(rows, 64 * 64).unflatten(2, (64, 64)))
        text = F.adaptive_max_pool1d(rows, self.grid**2).unflatten(2, (self.grid, self.grid))
        pixels = F.adaptive_avg_pool2d(maps[0], self.grid)
        if self.defects:
            pixels = pixels.permute(0, 2, 3, 1).reshape(pixels.shape)
        pixels = self.pixels(pixels)[queries.image_index]  # [Q, 256, G, G]
        classes = self.deconv(text + pixels)  # [Q, K + 1, h, w]
        others = [
            torch.logsumexp(torch.cat([classes[:, :slot], classes[:, slot + 1 :]], dim=1), dim=1)
            for slot in range(1, self.num_slots + 1)
        ]
        return [Grounding(presence, classes[:, 1:] - torch.stack(others, dim=1))]
